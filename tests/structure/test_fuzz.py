"""Random programs: what compaction computes is what masks compute, and a broken rule is noticed.

`JAXPRUNE_FUZZ=2000 python -m pytest tests/structure/test_fuzz.py` runs more of them.
"""

import os
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxprune import structure
from tests.structure import test_operations
from tests.support import operations
from tests.support.checks import compared, gap, graded, taken, zeroed
from tests.support.faults import FAULTS, install
from tests.support.jaxpr_numpy import evaluate

PROGRAMS = int(os.environ.get("JAXPRUNE_FUZZ", "60"))
CHUNKS = 4
# All rules that are broken, or JAXPRUNE_FAULTS of them, evenly spread.
_COUNT = int(os.environ.get("JAXPRUNE_FAULTS") or len(FAULTS))
BROKEN = list(FAULTS)[:: max(1, len(FAULTS) // _COUNT)][:_COUNT]
RETRIES = 80  # programs for a fault that the one on record no longer shows
# Reasons that name no operation in back-quotes.
WHY = (
    "an output has it",
    "no traced function uses it",
    "a convolution slides over it",
    "inputs of a grouped convolution",
    "a window slides over it",
    "all its indices are one unit",
)
TOLERANCE = 1e-7  # in float64; what a fault does is larger by orders of magnitude


class Report(NamedTuple):
    """What came of a program, or of several."""

    grouped: int = 0  # programs with groups
    comparisons: int = 0
    worst: float = 0.0
    unstable: int = 0  # where masks give NaN, or what rounding errors decide
    problem: str = ""

    def plus(self, other):
        return Report(
            *(a + b for a, b in zip(self[:2], other[:2])),
            max(self.worst, other.worst),
            self.unstable + other.unstable,
            "\n".join(filter(None, [self.problem, other.problem])),
        )


def steps_of(seed):
    return tuple(range(2 + seed % 6))


def choices(groups, rng):
    """Channels to keep of some groups: about half, all but one, or one alone."""
    keep = {}
    for name in [name for name in groups if rng.random() < 0.7] or list(groups)[:1]:
        size = groups[name].size
        count = rng.choice([(size + 1) // 2, max(size - 1, 1), 1])
        keep[name] = rng.permutation(np.arange(size) < count)
    for name, block in groups.blocks.items():
        if rng.random() < 0.5:
            keep[name] = rng.random(block.size) < 0.5
    return keep


def examine(seed, steps, focus=(), plans=2):
    """Compares a program with itself on smaller arrays."""
    with jax.enable_x64(True):
        leaves, traces, _ = operations.make(seed, steps, focus)
        groups = structure.find_groups(traces, leaves)
        if vague := [
            f for f in groups.frozen if "`" not in f.reason and not f.reason.startswith(WHY)
        ]:
            return Report(problem=f"frozen without a reason: {vague}")
        total, rng = Report(grouped=int(len(groups) > 0)), np.random.default_rng((seed, 2000))
        dense = [
            graded(trace, trace.function, leaves, groups.model.parameters)
            for trace in (traces if groups else [])
        ]
        for _ in range(plans if groups else 0):
            plan = groups.plan(choices(groups, rng), multiple=int(rng.choice([1, 1, 1, 2])))
            for trace, call in zip(traces, dense):
                total = total.plus(compare(groups, plan, trace, call, leaves))
            if total.problem:
                break
        return total


def compare(groups, plan, trace, call, leaves):
    """One trace on one plan."""
    gaps = compared(groups, plan, trace, call, leaves)
    if gaps is None:
        return Report(unstable=1)
    name, worst = max(gaps.items(), key=lambda item: np.nan_to_num(item[1], nan=np.inf))
    if worst <= TOLERANCE:
        return Report(comparisons=1, worst=worst)
    masked = zeroed(leaves, plan.kept, plan.model.parameters | plan.model.caches)
    if not is_stable(call, trace, masked):
        return Report(unstable=1)
    return Report(problem=f"{name} differ by {worst:.2g}")


def is_stable(call, trace, leaves):
    """Whether changes of the size of rounding errors change results no more than that."""
    rng, outs = np.random.default_rng(0), call(leaves, trace.args)
    for size in (1e-12, 1e-11, 1e-10):
        moved = {p: leaf * (1 + size * rng.normal(size=leaf.shape)) for p, leaf in leaves.items()}
        if not gap(outs, call(moved, trace.args)) < TOLERANCE:
            return False
    return True


def attempt(seed, steps, focus=()):
    """As `examine`; what is raised is a problem too, unless the fault of a test is misspelt."""
    try:
        return examine(seed, steps, focus)
    except (NameError, AttributeError, SyntaxError):
        raise
    except Exception as error:
        return Report(problem=f"{type(error).__name__}: {error}")


def smallest(seed, steps, focus=()):
    """Leaves out steps while the problem stays."""
    for step in steps[::-1]:
        fewer = tuple(other for other in steps if other != step)
        if fewer and attempt(seed, fewer, focus).problem:
            steps = fewer
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs(chunk):
    """Outputs, updates and gradients; in failures, the smallest program that still fails."""
    total, seeds = Report(), range(chunk, PROGRAMS, CHUNKS)
    for seed in seeds:
        report = attempt(seed, steps_of(seed))
        if report.problem:
            steps = smallest(seed, steps_of(seed))
            program = operations.describe(seed, steps)
            report = report._replace(problem=f"{attempt(seed, steps).problem}\n{program}")
        total = total.plus(report)
        if seed % 200 == 199:
            jax.clear_caches()  # thousands of traces do not fit in memory
    print(total._replace(problem=""))
    assert not total.problem, total.problem
    # Programs that freeze everything would test nothing.
    assert total.grouped > len(seeds) / 2 and total.comparisons > len(seeds)
    assert total.unstable < len(seeds) / 10


@pytest.mark.parametrize("seed", [1, 4, 7, 10])
def test_numpy_evaluates_programs_as_jax_does(seed):
    with jax.enable_x64(True):
        leaves, traces, _ = operations.make(seed, steps_of(seed))
        call = graded(traces[0], traces[0].function, leaves, leaves)
        flat = jax.tree.leaves((leaves, traces[0].args))
        by_jax = jax.jit(jax.extend.core.jaxpr_as_fun(call.closed))(*flat)
        assert gap(by_jax, evaluate(call.closed, *flat)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3, 5, 9])
def test_plans_of_plans(seed):
    """What is left can be pruned again, in one step as in two, by either function."""
    with jax.enable_x64(True):
        leaves, traces, _ = operations.make(seed, (0, 1, 2, 3))
        groups, rng = structure.find_groups(traces, leaves), np.random.default_rng(seed)
        assert groups
        first = groups.plan(
            {n: rng.permutation(np.arange(g.size) > 0) for n, g in groups.items()}, multiple=1
        )
        small = taken(leaves, first.kept)
        left = groups.compact(first)
        second = left.plan(
            {n: np.arange(g.size) < max(g.size - 1, 1) for n, g in left.items()}, multiple=1
        )
        for trace in traces:
            call = graded(trace, trace.function, leaves, groups.model.parameters)
            report = compare(groups, first.then(second), trace, call, leaves)
            assert not report.problem and report.comparisons
            inner = structure.Trace(first.wrap(trace.function), trace.args, trace.updates)
            call = graded(inner, inner.function, small, left.model.parameters)
            report = compare(left, second, inner, call, small)
            assert not report.problem and report.comparisons


# ---- faults


@pytest.mark.faults
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_noticed(name, monkeypatch):
    fault = FAULTS[name]
    install(monkeypatch, fault)
    if fault.case:
        with pytest.raises(AssertionError):
            getattr(test_operations, fault.case)()
        return
    others = [(seed, tuple(range(2 + seed % 4))) for seed in range(RETRIES)]
    for seed, steps in [fault.seen, *others] if fault.seen else others:
        if attempt(seed, steps, fault.focus).problem:
            return
    pytest.fail("no random program shows this fault: give it `focus`, or the programs an operation")
