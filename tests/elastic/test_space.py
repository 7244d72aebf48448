"""Decisions, choices, gates, and what a space refuses."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import elastic, structure
from jaxprune.elastic import Decision

DEPTH = Decision("stage", "depth", (0, 1, 2))
SPACE = [
    DEPTH,
    Decision("b0", "width", (2, 4), "stage", 0),
    Decision("b1", "width", (2, 4, 6), "stage", 1),
    Decision("b1/window", "kernel", (3, 5), "stage", 1),
    Decision("stem", "width", (4, 8)),
    Decision("resolution", "resolution", (6, 8)),
]


def test_count_is_the_number_of_different_choices():
    every = itertools.product(*(range(len(own.options)) for own in SPACE))
    different = {elastic.canonical(SPACE, choice) for choice in every}
    assert elastic.count(SPACE) == len(different) == 4 * (1 + 2 + 2 * 3 * 2)


def test_the_published_space_has_as_many_networks():
    """Five stages of 2 to 4 blocks, each with 3 windows and 3 widths: 2.2e19, as in the paper."""
    decisions = []
    for stage in range(5):
        decisions.append(Decision(f"s{stage}", "depth", (2, 3, 4)))
        for block in range(4):
            where = f"s{stage}", block
            decisions.append(Decision(f"s{stage}/b{block}/k", "kernel", (3, 5, 7), *where))
            decisions.append(Decision(f"s{stage}/b{block}/e", "width", (3, 4, 6), *where))
    assert elastic.count(decisions) == (9**2 + 9**3 + 9**4) ** 5


def test_choices_are_equal_where_they_differ_in_skipped_blocks_only():
    first, second = (1, 0, 0, 0, 1, 1), (1, 0, 2, 1, 1, 1)
    assert elastic.canonical(SPACE, first) == elastic.canonical(SPACE, second)
    assert elastic.used(SPACE, first) == (True, True, False, False, True, True)
    assert elastic.describe(SPACE, first) == {"stage": 1, "b0": 2, "stem": 8, "resolution": 8}


def test_draws_depend_on_the_seed_alone_and_reach_all_options():
    drawn = [elastic.draw(SPACE, np.random.default_rng(seed)) for seed in range(100)]
    assert drawn == [elastic.draw(SPACE, np.random.default_rng(seed)) for seed in range(100)]
    for index, own in enumerate(SPACE):
        assert {choice[index] for choice in drawn} == set(range(len(own.options)))


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ((0, 0), "6 indices"),
        ("abcdef", "6 indices"),
        ((3, 0, 0, 0, 0, 0), "stage: 3, must be 0 to 2"),
        ((0, -1, 0, 0, 0, True), r"b0: -1.*\n.*resolution: True"),
    ],
)
def test_a_choice_outside_of_the_space_is_an_error(choice, says):
    for function in (elastic.describe, elastic.used, elastic.canonical):
        with pytest.raises(ValueError, match=says):
            function(SPACE, choice)


def test_decisions_that_are_not_well_formed_are_listed():
    bad = [
        Decision("a", "width", (4, 2)),
        Decision("a", "length", (1,)),
        Decision("b", "width", (0, 2)),
        Decision("c", "kernel", (3,), "nowhere"),
    ]
    with pytest.raises(ValueError, match="names two") as error:
        elastic.count(bad)
    for part in ("that increase", "'length'", "from 1 on", "'nowhere'"):
        assert part in str(error.value)


def residual(v, x):
    """A convolution, a residual block with a hidden width, and a classifier."""
    w = v["params"]

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = jax.nn.relu(conv(x, w["stem"]))
    x = x + conv(jax.nn.relu(conv(x, w["up"])), w["down"])
    return x.mean((1, 2)) @ w["head"]


@pytest.fixture(scope="module")
def variables():
    draw = np.random.default_rng(0).normal
    shapes = {"stem": (5, 5, 2, 4), "up": (3, 3, 4, 6), "down": (3, 3, 6, 4), "head": (4, 3)}
    return {"params": {k: jnp.asarray(draw(size=own), jnp.float32) for k, own in shapes.items()}}


@pytest.fixture(scope="module")
def groups(variables):
    return structure.find_groups(residual, variables, jnp.ones((1, 6, 6, 2)))


@pytest.fixture(scope="module")
def space(groups, variables):
    (block,) = groups.blocks
    (up,) = (name for name in groups if "up" in name and name.endswith(":3"))
    return elastic.make_space(
        groups,
        variables,
        residual,
        widths={up: (2, 4, 6)},
        depths={"body": [block]},
        kernels={"params/stem": (3, 5)},
    )


def test_one_program_computes_all_choices(space):
    traced = []

    def function(*args):
        traced.append(args)
        return residual(*args)

    apply = jax.jit(space.masked(function))
    sizes = [range(len(own.options)) for own in space.decisions]
    x = jnp.ones((2, 6, 6, 2))
    outputs = [apply(space.variables, space.gates(own), x) for own in itertools.product(*sizes)]
    assert len(outputs) == 2 * 2 * 3
    assert len(traced) == 1


def test_each_choice_is_what_is_computed_by_hand(space, variables):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 2)), jnp.float32)
    apply = jax.jit(space.masked(residual))
    for choice in itertools.product((0, 1), (0, 1), (0, 1, 2)):
        own = dict(variables["params"])
        depth, window, width = choice
        if window == 0:
            own["stem"] = own["stem"][1:-1, 1:-1]
        count = (2, 4, 6)[width]
        own["up"], own["down"] = own["up"][..., :count], own["down"][:, :, :count] * depth
        expected = residual({"params": own}, x)
        found = apply(space.variables, space.gates(choice), x)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_skipping_is_exact(space, variables):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 2)), jnp.float32)
    own = variables["params"]
    without = {"params": own | {"up": own["up"] * 0, "down": own["down"] * 0}}
    gates = space.gates((0, 1, 2))
    found = jax.jit(space.masked(residual))(space.variables, gates, x)
    assert (found == jax.jit(residual)(without, x)).all()


def test_extracted_variables_compute_the_same(space):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 2)), jnp.float32)
    apply = jax.jit(space.masked(residual))
    for choice in itertools.product((0, 1), (0, 1), (0, 2)):
        small = elastic.extract(space, space.variables, choice)
        expected = apply(space.variables, space.gates(choice), x)
        found = small.plan.wrap(residual)(small.variables, x)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
        assert math.prod(small.crop()["params"]["stem"].shape[:2]) == (9, 25)[choice[1]]
        if choice[0]:  # "SAME" pads by the size of the kernel, so the function runs as it is
            np.testing.assert_allclose(residual(small.crop(), x), expected, rtol=2e-5, atol=2e-5)


def test_what_cannot_vary_is_refused_and_listed(groups, variables):
    with pytest.raises(ValueError, match="must name groups") as error:
        elastic.make_space(
            groups,
            variables,
            residual,
            widths={"nothing": (1, 2), next(iter(groups)): (1, 2)},
            depths={"body": ["params/stem"]},
            kernels={"params/head": (1, 3), "params/stem": (3, 4, 5), "params/up": (3, 5)},
        )
    text = str(error.value)
    for part in (
        "nothing: not a group",
        "params/stem in body: cannot be skipped",
        "params/head: no kernel",
        "must be odd",
        "params/up: windows (3, 5), the last must be all of (3, 3)",
        "the last must be all",
    ):
        assert part in text


def test_groups_of_different_sizes_cannot_share_a_decision(groups, variables):
    names = tuple(name for name in groups if groups[name].size in (4, 6))
    assert len({groups[name].size for name in names}) == 2
    with pytest.raises(ValueError, match="share a decision"):
        elastic.make_space(groups, variables, residual, widths={names: (2, 4)})
