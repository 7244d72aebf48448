"""Problems: decisions, masks as data, quick costs, and the wall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import search, stacks, structure
from jaxprune.search._pricing import quick_cost
from tests.support.searching import SIZE, planted, problem_of, synthetic

OWN = planted()


def candidates(problem, count=5):
    generator = np.random.default_rng(1)
    for _ in range(count):
        yield tuple(int(generator.choice(own.widths)) for own in problem.decisions)


# Decisions


def test_decisions_follow_the_layers_and_not_the_names():
    def apply(w, x):
        return jax.nn.relu(jax.nn.relu(x @ w["z"]) @ w["b"]) @ w["a"]

    w = {"a": jnp.ones((16, 2)), "b": jnp.ones((16, 16)), "z": jnp.ones((3, 16))}
    groups = structure.find_groups(apply, w, jnp.ones((1, 3)))
    layers = search.find_layers(apply, w, jnp.ones((1, 3)))
    cost = structure.count_parameters
    problem = search.channels(groups, w, layers, cost=cost, budget=1.0)
    assert [own.name for own in problem.decisions] == ["z:1", "b:1"]
    assert [own.layers[0].path for own in problem.decisions] == ["b", "a"]


def test_widths_are_multiples_from_the_floor_to_the_whole():
    problem = problem_of(OWN, 1.0, floor=0.3)
    assert problem.decisions[0].widths.tolist() == [16, 24, 32]
    assert problem_of(OWN, 1.0, floor=0.0, multiple=5).decisions[0].widths.tolist() == [
        *range(5, 32, 5),
        32,
    ]
    assert problem.decisions[0].at_least(0.53) == 24
    assert problem.decisions[0].at_least(0.0) == 16


@pytest.mark.parametrize("jit", [False, True])
def test_masked_variables_are_those_of_the_plan(jit):
    problem = problem_of(OWN, 1.0)
    masked = jax.jit(problem.masked) if jit else problem.masked
    for counts in candidates(problem):
        found = masked(OWN.variables, jnp.asarray(counts))
        jax.tree.map(
            np.testing.assert_array_equal, found, problem.outcome(counts).mask(OWN.variables)
        )


def test_the_highest_scores_are_kept_and_ties_keep_the_lower_index():
    scores = {name: np.arange(SIZE) % 4 for name in OWN.groups}
    problem = problem_of(OWN, 1.0, scores=scores)
    kept = problem.outcome((8, 16, 32)).channels(OWN.groups["a:1"])
    assert np.flatnonzero(kept).tolist() == list(range(3, SIZE, 4))


def test_groups_without_scores_are_kept_whole():
    problem = problem_of(OWN, 0.9, scores={"b:1": np.arange(SIZE)})
    assert [own.name for own in problem.decisions] == ["b:1"]
    assert problem.outcome((8,)).channels(OWN.groups["a:1"]).all()


def test_weights_are_masked_by_rank():
    params = {"w": jnp.array([[3.0, -4.0], [1.0, 2.0]]), "b": jnp.ones(2)}
    layers = search.find_layers(lambda p, x: x @ p["w"] + p["b"][None], params, jnp.ones((1, 2)))
    problem = search.weights(params, layers, budget=0.5, floor=0.25)
    assert [own.name for own in problem.decisions] == ["w"]
    masks = problem.outcome((2,))
    assert masks["w"].tolist() == [[True, True], [False, False]] and masks["b"].all()
    found = problem.masked(params, jnp.array([2]))
    np.testing.assert_array_equal(found["w"], jnp.where(masks["w"], params["w"], 0))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_copy_of_a_stack_is_a_decision_as_in_a_list(axis):
    copies, w = 3, np.random.default_rng(0).normal(size=(3, 8, 8))
    w *= np.array([1.0, 10.0, 0.1])[:, None, None]
    x = jnp.ones((1, 8))

    def by_list(w, x):
        for own in w:
            x = x @ own
        return x

    def by_scan(w, x):
        return jax.lax.scan(lambda x, own: (x @ own, None), x, jnp.moveaxis(w["w"], axis, 0))[0]

    alone = [jnp.asarray(own, jnp.float32) for own in w]
    stack = {"w": jnp.moveaxis(jnp.stack(alone), 0, axis)}
    layers = search.find_layers(by_scan, stack, x)
    stacked = stacks.under("w", axis=axis)
    found = search.weights(stack, layers, budget=0.4, floor=0.1, choices=9, stacked=stacked)
    parts = search.find_layers(by_list, alone, x)
    expected = search.weights(alone, parts, budget=0.4, floor=0.1, choices=9)
    assert [own.name for own in found.decisions] == ["w[0]", "w[1]", "w[2]"]
    assert (found.dense, found.budget) == (expected.dense, expected.budget)
    for index in range(copies):
        ours, theirs = found.decisions[index], expected.decisions[index]
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        assert ours.layers[0].macs == theirs.layers[0].macs
    for counts in [*candidates(expected), found.floors]:
        masks = np.moveaxis(found.outcome(counts)["w"], axis, 0)
        np.testing.assert_array_equal(masks, np.stack(expected.outcome(counts)))
        zeroed = jax.jit(found.masked)(stack, jnp.asarray(counts))["w"]
        np.testing.assert_array_equal(zeroed, np.where(found.outcome(counts)["w"], stack["w"], 0))


def test_copies_along_two_axes_and_the_cost_of_a_stack():
    experts = {"w": jnp.arange(1.0, 2 * 3 * 4 * 5 + 1).reshape(2, 4, 3, 5)}
    layers = [search.Layer("w", c=4, n=5, rows=1, weights=120, macs=120)]
    stacked = stacks.under("w", axis=(0, 2))
    cost = search.weight_macs(layers)
    problem = search.weights(experts, layers, budget=0.5, cost=cost, stacked=stacked, floor=0.1)
    assert [own.name for own in problem.decisions] == [
        f"w[{i},{j}]" for i in (0, 1) for j in range(3)
    ]
    masks = np.asarray(problem.outcome((2, 4, 6, 8, 10, 12))["w"])
    assert masks.sum((1, 3)).tolist() == [[2, 4, 6], [8, 10, 12]]
    assert problem.account((2, 4, 6, 8, 10, 12)) == 42
    with pytest.raises(ValueError, match="`stacked` matches no leaf"):
        search.weights(experts, layers, budget=0.5, stacked=stacks.under("layers"))


def test_residual_streams_decide_together():
    def apply(w, x):
        x = x @ w["in"]
        for name in ("one", "two"):
            x = x + jax.nn.relu(x @ w[name]["up"]) @ w[name]["down"]
        return x @ w["out"]

    block = {"up": jnp.ones((16, 32)), "down": jnp.ones((32, 16))}
    w = {"in": jnp.ones((3, 16)), "one": block, "two": block, "out": jnp.ones((16, 2))}
    groups = structure.find_groups(apply, w, jnp.ones((1, 3)))
    layers = search.find_layers(apply, w, jnp.ones((1, 3)))
    problem = search.channels(groups, w, layers, cost=structure.count_parameters, budget=1.0)
    assert [own.name for own in problem.decisions] == ["in:1", "one/up:1", "two/up:1"]
    assert [own.path for own in problem.decisions[0].layers] == ["one/up", "two/up", "out"]


# Costs


def test_quick_costs_are_exact():
    cost = structure.mac_cost(OWN.groups, OWN.apply, OWN.variables, OWN.images[:1])
    problem = search.channels(OWN.groups, OWN.variables, OWN.layers, cost=cost, budget=1.0)
    asked = []
    quick = quick_cost(
        lambda counts: asked.append(counts) or problem.account(counts),
        [own.widths for own in problem.decisions],
        [(0, 1), (1, 2)],
    )
    count = len(asked)
    for counts in candidates(problem, 20):
        assert quick(counts) == problem.account(counts) == cost(problem.outcome(counts))
    assert len(asked) == count  # the cost itself is not called any more


def test_a_cost_of_another_form_is_called_itself():
    widths = [np.arange(1, 9)] * 2
    quick = quick_cost(lambda counts: counts[0] ** 3 + counts[1], widths, [])
    assert quick((3, 4)) == 31


@given(st.data())
def test_products_of_decisions_that_share_a_leaf_are_exact(data):
    sizes = data.draw(st.lists(st.integers(2, 9), min_size=3, max_size=3))
    parts = data.draw(st.lists(st.integers(0, 5), min_size=4, max_size=4))

    def cost(counts):
        a, b, c = counts
        return 1 + parts[0] * a + parts[1] * a * b + parts[2] * b * c + parts[3] * a * b * c

    quick = quick_cost(cost, [np.arange(1, own + 1) for own in sizes], [(0, 1, 2)])
    counts = tuple(data.draw(st.integers(1, own)) for own in sizes)
    assert quick(counts) == cost(counts)


# The wall


@st.composite
def walled(draw):
    """A problem with a cost that rises with every count, and what the decisions want."""
    count = draw(st.integers(1, 5))
    widths = [
        np.unique(draw(st.lists(st.integers(1, 40), min_size=1, max_size=8))) for _ in range(count)
    ]
    linear = draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    pairs = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    root = draw(st.booleans())

    def cost(counts):
        value = sum(a * k for a, k in zip(linear, counts, strict=True))
        value += sum(
            b * k * counts[i - 1] for i, (b, k) in enumerate(zip(pairs, counts, strict=True))
        )
        return value**0.5 if root else value

    least = cost([own[0] for own in widths])
    most = cost([own[-1] for own in widths])
    budget = least + draw(st.floats(0, 1)) * (most - least)
    fractions = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    return synthetic(widths, cost, budget), fractions


@given(walled())
def test_the_wall_is_never_exceeded_and_floors_are_kept(case):
    problem, fractions = case
    counts = search.within(problem, fractions)
    assert problem.cost(counts) <= problem.budget
    for own, count, fraction in zip(problem.decisions, counts, fractions, strict=True):
        assert count in own.widths
        assert own.floor <= count <= own.at_least(fraction)


@given(walled())
def test_the_budget_is_reached_within_one_rounding_step(case):
    problem, _ = case
    counts = search.within(problem, [1.0] * len(problem.decisions))
    for index, (own, count) in enumerate(zip(problem.decisions, counts, strict=True)):
        wider = own.widths[own.widths > count]
        if len(wider):  # with the floors of the later ones, it would not fit
            after = problem.floors[index + 1 :]
            assert problem.cost((*counts[:index], int(wider[0]), *after)) > problem.budget


# Bad input


def test_a_budget_below_the_floors_says_the_least_possible():
    with pytest.raises(ValueError, match=r"`budget` 0\.01 is below 0\.0\d+, the least possible"):
        problem_of(OWN, 0.01)


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "half", float("nan")])
def test_a_budget_is_a_share(budget):
    with pytest.raises(
        ValueError, match=r"`budget` must be a share of the dense cost, in \(0, 1\]"
    ):
        problem_of(OWN, budget)


def test_groups_of_another_model_are_refused():
    other = {**OWN.variables, "a": jnp.ones((6, SIZE + 1))}
    with pytest.raises(ValueError, match=r"belong to a different model[\s\S]*a: \(6, 33\), not"):
        search.channels(OWN.groups, other, OWN.layers, cost=structure.count_parameters, budget=0.5)


def test_a_model_without_groups_says_why():
    w = {"w": jnp.ones((3, 2))}
    groups = structure.find_groups(lambda w, x: x @ w["w"], w, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"at least one group of channels[\s\S]*w dimension 1"):
        search.channels(groups, w, (), cost=structure.count_parameters, budget=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 1.5}, "`floor` must be a fraction"),
        ({"multiple": 0}, "`multiple` must be an integer of at least 1"),
        ({"scores": {"nowhere": np.ones(3)}}, "nowhere: not a group"),
        ({"scores": {"a:1": np.ones(3)}}, "must be 32 finite numbers"),
    ],
)
def test_options_of_channels_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        problem_of(OWN, 0.9, **options)


def test_options_of_weights_are_checked():
    own = {"w": jnp.ones((4, 4))}
    layers = search.find_layers(lambda w, x: x @ w["w"], own, jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="`choices` must be an integer of at least 2"):
        search.weights(own, layers, budget=0.5, choices=1)
    with pytest.raises(ValueError, match="`layers` must come from `find_layers`"):
        search.weights({"v": jnp.ones((4, 4))}, layers, budget=0.5)
    own["unused"] = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="at least one leaf that is pruned"):
        search.weights(own, layers, budget=0.5, prunable=["unused"])


def test_a_cost_must_be_a_number():
    with pytest.raises(ValueError, match="`cost` must be a positive number, but is nan"):
        search.channels(
            OWN.groups, OWN.variables, OWN.layers, cost=lambda plan: float("nan"), budget=0.5
        )


# Layers


def test_layers_are_described():
    def apply(w, x):
        x = jax.lax.conv_general_dilated(
            x, w["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.conv_general_dilated(
            x,
            w["depth"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=8,
        )
        return jnp.mean(x, (1, 2)) @ w["head"]

    w = {"conv": jnp.ones((5, 5, 3, 8)), "depth": jnp.ones((3, 3, 1, 8)), "head": jnp.ones((8, 2))}
    x = jnp.ones((2, 6, 10, 3))
    conv, depth, head = search.find_layers(apply, w, x)
    assert (conv.n, conv.c, conv.h, conv.w, conv.stride, conv.k) == (8, 3, 6, 10, 2, 5)
    assert (depth.groups, depth.c, depth.n, head.stride, head.k, head.rows) == (8, 8, 8, 0, 1, 2)
    assert sum(own.macs for own in (conv, depth, head)) == structure.count_macs(apply, w, x)


def test_layers_of_loops_and_shared_kernels_count_as_often_as_they_run():
    def apply(w, x):
        x = jax.lax.scan(lambda x, own: (jnp.tanh(x @ own), None), x, w["stack"])[0]
        x = jax.lax.fori_loop(0, 3, lambda _, x: x @ w["shared"], x)
        return (x @ w["shared"]) @ w["out"]

    w = {"stack": jnp.ones((5, 4, 4)), "shared": jnp.ones((4, 4)), "out": jnp.ones((4, 2))}
    layers = search.find_layers(apply, w, jnp.ones((2, 4)))
    assert {own.path: own.macs for own in layers} == {"stack": 160, "shared": 128, "out": 16}


def test_a_function_without_layers_is_an_error():
    with pytest.raises(ValueError, match="`function` must multiply or convolve"):
        search.find_layers(lambda w, x: x + w["w"], {"w": jnp.ones(3)}, jnp.ones(3))
