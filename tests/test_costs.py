"""Multiply-accumulates against XLA, costs of plans against what they make, measurements."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from structure_checks import draw, halves

from jaxprune import models, reports, structure

IMAGES, KERNEL = draw(2, 9, 9, 6), draw(3, 3, 6, 4)
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, kernel, **options):
    options = {"window_strides": (1, 1), "padding": "VALID"} | options
    return lax.conv_general_dilated(x, kernel, dimension_numbers=NHWC, **options)


EXACT = {
    "matrix": (jnp.dot, draw(3, 5), draw(5, 7)),
    "batched": (lambda a, b: jnp.einsum("bik,bkj->bij", a, b), draw(2, 3, 5), draw(2, 5, 7)),
    "convolution": (conv, IMAGES, KERNEL),
    "strided": (lambda x, k: conv(x, k, window_strides=(2, 2)), IMAGES, KERNEL),
    "kernel dilated": (lambda x, k: conv(x, k, rhs_dilation=(2, 2)), IMAGES, KERNEL),
    "grouped": (lambda x, k: conv(x, k, feature_group_count=3), IMAGES, draw(3, 3, 2, 6)),
    "depthwise": (lambda x, k: conv(x, k, feature_group_count=6), IMAGES, draw(3, 3, 1, 6)),
}


@pytest.mark.parametrize("name", EXACT)
def test_xla_counts_two_operations_for_each(name):
    function, *args = EXACT[name]
    flops = jax.jit(function).lower(*args).compile().cost_analysis()["flops"]
    assert structure.count_macs(function, *args) == flops / 2


def test_padding_counts_for_us_and_not_for_xla():
    def same(x, kernel):
        return conv(x, kernel, padding="SAME")

    ours = structure.count_macs(same, IMAGES, KERNEL)
    xla = jax.jit(same).lower(IMAGES, KERNEL).compile().cost_analysis()["flops"] / 2
    inside = sum(min(i + 2, 9) - max(i - 1, 0) for i in range(9)) ** 2
    assert ours == 2 * 81 * 9 * 6 * 4 and xla == 2 * inside * 6 * 4


CONTROL = {
    "scan": (lambda w, x: lax.scan(lambda c, _: (c @ w, None), x, length=5)[0], 5),
    "cond": (lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), 2),
    "jit": (lambda w, x: jax.jit(jnp.dot)(x, w), 1),
    "remat": (lambda w, x: jax.checkpoint(jnp.dot)(x, w), 1),
    "relu": (lambda w, x: jax.nn.relu(x @ w), 1),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_counts_what_runs(name):
    function, times = CONTROL[name]
    assert structure.count_macs(function, draw(4, 4), draw(2, 4)) == times * 2 * 4 * 4


def resnet20():
    model = models.resnet20(num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    model.eval()
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, rest = map(nnx.to_pure_dict, states)
    return lambda params, images: nnx.merge(graphdef, params, rest)(images), params


def test_macs_of_resnet20():
    apply, params = resnet20()
    image = jnp.zeros((1, 32, 32, 1))
    ours = structure.count_macs(apply, params, image)
    # Stem, 6 blocks a stage, projections and head, by hand.
    stem, head = 32 * 32 * 9 * 16, 64 * 10
    first = 6 * 32 * 32 * 9 * 16 * 16
    second = 16 * 16 * 9 * 32 * (16 + 5 * 32) + 16 * 16 * 16 * 32
    third = 8 * 8 * 9 * 64 * (32 + 5 * 64) + 8 * 8 * 32 * 64
    assert ours == stem + first + second + third + head
    xla = jax.jit(apply).lower(params, image).compile().cost_analysis()["flops"] / 2
    assert 0.9 < xla / ours < 1, "without padding, with additions and the like"


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
        plan = groups.plan(halves(groups, seed) if seed else {})
        small = plan.compact(variables)
        assert cost(plan) == structure.count_macs(plan.wrap(function), small, x)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(small))
        assert structure.byte_cost(variables)(plan) == nbytes


def test_costs_of_plans_of_a_resnet():
    apply, params = resnet20()
    image = jnp.zeros((1, 8, 8, 1))
    groups = structure.find_groups(apply, params, image)
    cost = structure.mac_cost(groups, apply, params, image)
    keep = structure.keep_within(
        groups, structure.filter_norms(groups, params), cost(groups.plan({})) / 2, cost
    )
    plan = groups.plan(keep)
    found = structure.count_macs(plan.wrap(apply), plan.compact(params), image)
    assert cost(plan) == found <= structure.count_macs(apply, params, image) / 2


def test_memory_of_a_donated_argument_is_counted_once():
    def double(x):
        return x * 2

    x = jnp.ones(4096)
    plain, donated = (reports.measure_memory(double, x, donate_argnums=own) for own in ((), (0,)))
    assert plain.arguments == plain.outputs == donated.aliased == x.nbytes
    assert plain.peak - donated.peak == x.nbytes


def test_a_comparison_reads_as_a_table_and_as_json():
    x = draw(4, 8)
    calls = {"dense": (jnp.dot, draw(8, 8), x.T), "half": (jnp.dot, draw(4, 8), x.T)}
    comparison = reports.compare(calls, repeats=2)
    lines = str(comparison).splitlines()
    assert lines[0].split() == "parameters MACs peak bytes ms 10-90 % times".split()
    assert lines[2].split()[:3] == ["dense", "64", "256"]
    record = json.loads(json.dumps(comparison.to_dict()))
    assert record["half"]["macs"] == 128 and record["half"]["latency"]["repeats"] == 2
    latency = comparison.costs["dense"].latency
    assert 0 < latency.low <= latency.median <= latency.high and math.isfinite(latency.compilation)


def test_bad_input():
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        reports.measure_latency(jnp.sin, np.ones(1), repeats=0)
    with pytest.raises(ValueError, match="`calls` must name at least one function"):
        reports.compare({})
