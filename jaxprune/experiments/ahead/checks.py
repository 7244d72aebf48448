"""Checks of a compiled training step: where pruning keeps its state, and what it moves."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxprune import programs, training, trees
from jaxprune.experiments.ahead.steps import OPTIMIZER, Network, Program

TOLERANCE = 0.25  # by which costs may exceed what MACs say, relative
OWN = 8 * 2**20  # bytes that a compiler takes for itself, whatever the network
NUMBERS = 64  # bytes for each pruned leaf: counters, densities, vectors of channels


class Check(NamedTuple):
    """One line of a report."""

    passed: bool
    text: str


def check_all(networks: Sequence[Network], found: Sequence[Program]) -> list[Check]:
    """Checks the programs of a network and of the smaller one."""
    dense, params = found[0], networks[0].variables["params"]
    checks = []
    if jax.tree.leaves(masks_of(dense.state)):
        checks += [
            check_gathers(dense.collectives, smallest_split(params, dense.state)),
            check_masks(dense.state),
            check_statistics(dense.state),
        ]
    return [*checks, check_in_place(dense), *check_smaller([own.macs for own in networks], found)]


def check_gathers(collectives: Sequence[programs.Collective], size: int) -> Check:
    """Checks that pruning gathers no array as large as a whole parameter."""
    own = [
        one
        for one in collectives
        # Where XLA joins several gathers, it drops their names or lists them: "(jvp:optimizer)".
        if one.kind == "all-gather"
        and (one.conditional or not one.source or re.search(rf"\b{OPTIMIZER}\b", one.source))
    ]
    if large := [one for one in own if max(one.sizes) >= size]:
        names = ", ".join(f"{max(one.sizes)} entries for {one.source!r}" for one in large[:3])
        text = f"{len(large)} all-gathers of {size} or more entries by pruning: {names}"
        return Check(False, text)
    largest = max((max(one.sizes) for one in own), default=0)
    text = f"all-gathers by pruning have {largest} entries at most, the smallest parameter {size}"
    return Check(True, text)


def check_masks(state: training.TrainState) -> Check:
    """Checks that a mask has one byte for each pruned weight, and is split like the weight."""
    owners = trees.leaf_by_path(state.params)
    masks = trees.leaf_by_path(masks_of(state))
    problems = [
        f"{path}: {mask.dtype}{list(mask.shape)} for a parameter {list(owners[path].shape)}"
        for path, mask in masks.items()
        if (mask.dtype, mask.shape) != ("pred", owners[path].shape)
    ]
    nbytes, weights = sum(own.bytes for own in masks.values()), pruned_weights(state)
    if problems:
        return Check(False, f"masks must be bools, split like parameters: {first(problems)}")
    text = f"masks take {nbytes} bytes for {weights} pruned weights; 1 for each at most"
    return Check(nbytes <= weights, text)


def check_statistics(state: training.TrainState) -> Check:
    """Checks that statistics have four bytes for each pruned weight, and are split like it."""
    owners = trees.leaf_by_path(state.params)
    leaves = trees.leaf_by_path(statistics_of(state))
    problems = []
    for path, leaf in leaves.items():
        owner = next((own for own in owners if path.endswith(f"/{own}")), None)
        if owner is not None and leaf.shape != owners[owner].shape:
            problems.append(f"{path}: {list(leaf.shape)} for one of {list(owners[owner].shape)}")
    nbytes, weights = sum(own.bytes for own in leaves.values()), pruned_weights(state)
    if problems:
        return Check(False, f"statistics must be split like parameters: {first(problems)}")
    numbers = NUMBERS * len(jax.tree.leaves(masks_of(state)))
    text = f"statistics take {nbytes} bytes for {weights} pruned weights; 4 for each at most, and "
    return Check(nbytes <= 4 * weights + numbers, f"{text}{numbers} for counters")


def check_in_place(program: Program) -> Check:
    """Checks that the new state takes the memory of the old one."""
    nbytes = sum(own.padded for own in jax.tree.leaves(program.state))
    aliased = program.memory.aliased
    text = f"the step writes {aliased} bytes in place; its state has {nbytes}"
    return Check(aliased >= nbytes, text)


def check_smaller(macs: Sequence[int], found: Sequence[Program]) -> list[Check]:
    """Checks that with half of the channels FLOPs fall as MACs do, and memory as their root."""
    ratio = macs[1] / macs[0]
    measured = {
        "FLOPs": (ratio, 0, [own.flops for own in found]),
        "peak memory": (math.sqrt(ratio), OWN, [own.memory.peak for own in found]),
    }
    checks = []
    for name, (expected, own, (whole, half)) in measured.items():
        limit = (1 + TOLERANCE) * expected + own / whole
        text = f"half of the channels: {half / whole:.3f} of the {name}; MACs say {expected:.3f}"
        checks.append(Check(half / whole <= limit, f"{text}, at most {min(limit, 1):.3f}"))
    return checks


def check_fits(program: Program, nbytes: int) -> Check:
    """Checks that the peak fits into memory; XLA only warns for GPUs."""
    text = (
        f"the peak of {program.memory.peak} bytes must fit into {nbytes}, what JAX takes of a GPU"
    )
    return Check(program.memory.peak <= nbytes, text)


# ---- the state of a program


def pruning_of(state: training.TrainState) -> Any:
    """Returns the state of the pruning transformation; None for a dense run."""

    def is_pruning(value: Any) -> bool:
        return "masks" in getattr(value, "_fields", ())

    values = jax.tree.leaves(state.opt_state, is_leaf=is_pruning)
    return next(filter(is_pruning, values), None)


def masks_of(state: training.TrainState) -> Any:
    """Returns the masks; nothing for a dense run."""
    pruning = pruning_of(state)
    return () if pruning is None else pruning.masks


def statistics_of(state: training.TrainState) -> Any:
    """Returns all state of pruning but the masks."""
    pruning = pruning_of(state)
    return () if pruning is None else pruning._replace(masks=())


def pruned_weights(state: training.TrainState) -> int:
    """Counts the masked entries on one device; those of all parameters if channels are pruned."""
    params = trees.leaf_by_path(state.params)
    of_channels = trees.state_fields(state.opt_state, "channels")
    paths = params if of_channels else trees.leaf_by_path(masks_of(state))
    return sum(math.prod(params[path].shape) for path in paths)


def smallest_split(params: Any, state: training.TrainState) -> int:
    """Returns the size of the smallest masked parameter that is split, or of the smallest."""
    whole = {path: leaf.shape for path, leaf in trees.leaf_by_path(params).items()}
    own = trees.leaf_by_path(state.params)
    masked = trees.leaf_by_path(masks_of(state))
    split = [path for path in masked if own[path].shape != whole[path]]
    return min(math.prod(whole[path]) for path in split or masked)


def first(problems: Sequence[str]) -> str:
    """Shows the first few of a list."""
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
