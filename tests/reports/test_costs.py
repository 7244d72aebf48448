"""Multiply-accumulates against XLA, costs of plans against what they make, measurements."""

import functools
import json
import math
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.experimental import pallas

from jaxprune import models, reports, structure
from tests.support.checks import draw, halves

IMAGES, KERNEL = draw(2, 9, 9, 6), draw(3, 3, 6, 4)
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": [(0, 0), (0, 0)]} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=NHWC, **options)


EXACT = {
    "matrix": (jnp.dot, draw(3, 5), draw(5, 7)),
    "batched": (lambda a, b: jnp.einsum("bik,bkj->bij", a, b), draw(2, 3, 5), draw(2, 5, 7)),
    "convolution": (conv, IMAGES, KERNEL),
    "strided": (lambda x, k: conv(x, k, window_strides=(2, 2)), IMAGES, KERNEL),
    "kernel dilated": (lambda x, k: conv(x, k, rhs_dilation=(2, 2)), IMAGES, KERNEL),
    "transposed": (lambda x, k: conv(x, k, lhs_dilation=(2, 3)), IMAGES, KERNEL),
    "transposed, strided": (
        lambda x, k: conv(x, k, lhs_dilation=(3, 3), window_strides=(2, 2), rhs_dilation=(2, 1)),
        IMAGES,
        KERNEL,
    ),
    "grouped": (lambda x, k: conv(x, k, feature_group_count=3), IMAGES, draw(3, 3, 2, 6)),
    "depthwise": (lambda x, k: conv(x, k, feature_group_count=6), IMAGES, draw(3, 3, 1, 6)),
}


@pytest.mark.parametrize("name", EXACT)
def test_xla_counts_two_operations_for_each(name):
    function, *args = EXACT[name]
    flops = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
    assert structure.count_macs(function, *args) == flops / 2


def test_gradients_cost_twice_the_function():
    def loss(x, kernel):
        return (conv(x, kernel, feature_group_count=3) ** 2).sum()

    kernel = draw(3, 3, 2, 6)
    once = structure.count_macs(loss, IMAGES, kernel)
    # The gradient for the input slides over all of its 9 places, the output has 7.
    of_input = once * 9**2 // 7**2
    both = structure.count_macs(jax.grad(loss, (0, 1)), IMAGES, kernel)
    assert both == once + once + of_input  # forward, for the kernel, for the input


def test_padding_counts_for_us_and_not_for_xla():
    def same(x, kernel):
        return conv(x, kernel, padding="SAME")

    ours = structure.count_macs(same, IMAGES, KERNEL)
    xla = jax.jit(same).lower(IMAGES, KERNEL).compile().cost_analysis()["flops"] / 2
    inside = sum(min(i + 2, 9) - max(i - 1, 0) for i in range(9)) ** 2
    assert ours == 2 * 81 * 9 * 6 * 4 and xla == 2 * inside * 6 * 4


@jax.custom_jvp
def own_jvp(w, x):
    return x @ w


@jax.custom_vjp
def own_vjp(w, x):
    return x @ w


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), tangents[1] @ primals[0] @ primals[0]))
own_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda held, g: (held[0], g @ held[0] @ held[0]))


CONTROL = {
    "scan": (lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=5)[0], 5),
    "cond": (lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), 2),
    "jit": (lambda w, x: jax.jit(jnp.dot)(x, w), 1),
    "remat": (lambda w, x: jax.checkpoint(jnp.dot)(x, w), 1),
    "relu": (lambda w, x: jax.nn.relu(x @ w), 1),
    "custom jvp": (own_jvp, 1),
    "custom vjp": (own_vjp, 1),
    "while": (lambda w, x: lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ w, x), 1),
    "scan of scan": (
        lambda w, x: lax.scan(
            lambda c, _: (lax.scan(lambda d, _: (d @ w, None), c, length=3)[0] @ w, None),
            x,
            length=5,
        )[0],
        20,
    ),
    "unused": (lambda w, x: (x @ w, w @ w)[0], 1),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_counts_what_runs(name):
    function, times = CONTROL[name]
    assert structure.count_macs(function, draw(4, 4), draw(2, 4)) == times * 2 * 4 * 4


def in_a_kernel(w, x):
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    return pallas.pallas_call(kernel, shape, grid=(3,), interpret=True)(x, w)


def test_what_cannot_be_counted_is_refused():
    w, x = draw(4, 4), draw(2, 4)
    with pytest.raises(ValueError, match="`pallas_call` has some; count that part by itself"):
        structure.count_macs(in_a_kernel, w, x)

    def function(variables, x):
        return in_a_kernel(variables["own"], x @ variables["a"] @ variables["b"])

    variables = {"a": draw(4, 8), "b": draw(8, 4), "own": w}
    groups = structure.find_groups(function, variables, x)
    assert list(groups) == ["a:1"]
    with pytest.raises(ValueError, match="`pallas_call` has some; count that part by itself"):
        structure.mac_cost(groups, function, variables, x)


def resnet20():
    """Evaluation and training, and their variables."""
    model = models.resnet20(num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)

    def run(train, variables, images):
        own = nnx.merge(graphdef, variables["params"], variables["state"])
        own.train() if train else own.eval()
        logits = own(images)
        return logits, {"state": nnx.to_pure_dict(nnx.state(own, nnx.Not(nnx.Param)))}

    functions = functools.partial(run, False), functools.partial(run, True)
    return functions, {"params": params, "state": rest}


def test_macs_of_resnet20():
    (evaluate, _), variables = resnet20()
    image = jnp.zeros((1, 32, 32, 1))
    ours = structure.count_macs(evaluate, variables, image)
    # Stem, 6 blocks a stage, projections and head, by hand.
    stem, head = 32 * 32 * 9 * 16, 64 * 10
    first = 6 * 32 * 32 * 9 * 16 * 16
    second = 16 * 16 * 9 * 32 * (16 + 5 * 32) + 16 * 16 * 16 * 32
    third = 8 * 8 * 9 * 64 * (32 + 5 * 64) + 8 * 8 * 32 * 64
    assert ours == stem + first + second + third + head
    xla = jax.jit(evaluate).lower(variables, image).compile().cost_analysis()["flops"] / 2
    assert xla / ours == pytest.approx(0.93, abs=0.005), "the docstring of `count_macs` says so"


def test_costs_of_plans_are_those_of_their_functions():
    variables = {"a": draw(5, 8), "again": draw(8, 8), "b": draw(8, 3)}

    def function(w, x):
        hidden = lax.scan(
            lambda c, _: (jnp.tanh(c @ w["again"]), None), jax.nn.relu(x @ w["a"]), length=3
        )[0]
        return lax.cond(x[0, 0] > 0, lambda h: h @ w["b"], lambda h: -(h @ w["b"]), hidden)

    x = draw(2, 5)
    groups = structure.find_groups(function, variables, x)
    cost = structure.mac_cost(groups, function, variables, x)
    for seed in range(3):
        plan = groups.plan(halves(groups, seed) if seed else {}, multiple=1)
        small = plan.compact(variables)
        assert cost(plan) == structure.count_macs(plan.wrap(function), small, x)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
        assert structure.byte_cost(variables)(plan) == nbytes


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_costs_of_plans_of_a_resnet(train):
    functions, variables = resnet20()
    images = jnp.zeros((2, 8, 8, 1))
    traces = [structure.Trace(own, (images,), lambda output: output[1]) for own in functions]
    groups = structure.find_groups(traces, variables)
    function = functions[train]
    cost = structure.mac_cost(groups, function, variables, images)
    whole = cost(groups.plan({}))
    scores = structure.filter_norms(groups, variables)
    plan = groups.plan(structure.keep_within(groups, scores, whole / 2, cost), multiple=1)
    found = structure.count_macs(plan.wrap(function), plan.compact(variables), images)
    assert cost(plan) == found <= whole / 2
    assert whole == structure.count_macs(function, variables, images)
    rest = groups.compact(plan)
    with pytest.raises(ValueError, match="`plan` must be made from the groups of this cost"):
        cost(rest.plan({}))
    smaller = structure.mac_cost(rest, plan.wrap(function), plan.compact(variables), images)
    assert smaller(rest.plan({})) == found


def test_memory_of_a_donated_argument_is_counted_once():
    def double(x):
        return x * 2

    x = jnp.ones(4096)
    plain, donated = (reports.measure_memory(double, x, donate_argnums=own) for own in ((), (0,)))
    assert plain.arguments == plain.outputs == donated.aliased == x.nbytes
    assert plain.peak - donated.peak == x.nbytes
    assert reports.measure_memory(jax.jit(double).lower(x).compile()) == plain


def test_a_comparison_reads_as_a_table_and_as_json():
    x = draw(4, 8)
    calls = {"dense": (jnp.dot, draw(8, 8), x.T), "half": (jnp.dot, draw(4, 8), x.T)}
    comparison = reports.compare(calls, repeats=2)
    lines = str(comparison).splitlines()
    assert lines[0].split() == "parameters bytes MACs peak bytes ms 10-90 % times".split()
    assert lines[2].split()[:4] == ["dense", "64", "256", "256"]
    record = json.loads(json.dumps(comparison.to_dict()))
    assert record["half"]["macs"] == 128 and record["half"]["latency"]["repeats"] == 2
    latency = comparison.costs["dense"].latency
    assert 0 < latency.low <= latency.median <= latency.high and math.isfinite(latency.compilation)


def test_a_comparison_compiles_each_function_once(monkeypatch):
    # A second compilation would be the one that is timed, and without the time to trace.
    compiled, compiling = [], jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: compiled.append(self) or compiling(self)
    )
    x = jnp.ones(3)
    reports.compare({"one": (jnp.add, x, x), "two": (jnp.multiply, x, x)}, repeats=1)
    assert len(compiled) == 2


@pytest.mark.scripts
def test_the_benchmark_runs(monkeypatch, tmp_path, capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "structure.py"
    record = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--json", str(record)])
    runpy.run_path(str(path), run_name="__main__")
    dense, masked, compacted, by_hand = json.loads(record.read_text())["arms"]
    assert dense["MACs"] == masked["MACs"] > compacted["MACs"] == by_hand["MACs"]
    assert compacted["GFLOP"] == by_hand["GFLOP"] < dense["GFLOP"]
    assert compacted["peak MiB"] < dense["peak MiB"] < masked["peak MiB"]
    assert f"{compacted['parameters']:,}" in capsys.readouterr().out


def test_bad_input():
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        reports.measure_latency(jnp.sin, np.ones(1), repeats=0)
    with pytest.raises(ValueError, match="`calls` must name at least one function"):
        reports.compare({})
