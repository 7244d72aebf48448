"""Scores of channels against plain NumPy, and what is kept by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import models, structure, trees
from jaxprune.structure import Group, Groups

MODEL = models.resnet8(num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
GRAPHDEF, PARAMS, REST = nnx.split(MODEL, nnx.Param, ...)
STATE = nnx.to_pure_dict(REST)
PARAMS = jax.tree.map(
    lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)),
    nnx.to_pure_dict(PARAMS),
)
IMAGES = jax.random.normal(jax.random.key(3), (2, 8, 8, 1))


def apply(params, images):
    model = nnx.merge(GRAPHDEF, params, STATE)
    model.eval()
    return model(images)


@pytest.fixture(scope="module")
def groups():
    return structure.find_groups(
        lambda variables, images: nnx.merge(GRAPHDEF, variables["params"], variables["state"])(
            images,
        ),
        {"params": PARAMS, "state": STATE},
        IMAGES,
    )


VARIABLES = {"params": PARAMS, "state": STATE}
INNER = "params/blocks/0/conv1/kernel:3"
SHARED = "params/blocks/0/conv2/kernel:3"


def leaf(path):
    return np.asarray(trees.leaf_by_path(VARIABLES)[path], np.float64)


@pytest.mark.parametrize("order", [1, 2, np.inf])
def test_filter_norms(groups, order):
    found = structure.filter_norms(groups, VARIABLES, order)

    def norms(path):
        kernel = leaf(path)
        return np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), ord=order, axis=0)

    np.testing.assert_allclose(found[INNER], norms("params/blocks/0/conv1/kernel"))
    # The stem adds to the residual stream as well; consumers of the stream do not count.
    both = norms("params/blocks/0/conv2/kernel") + norms("params/stem/conv/kernel")
    np.testing.assert_allclose(found[SHARED], both)


def test_norm_scales(groups):
    found = structure.norm_scales(groups, VARIABLES)
    np.testing.assert_allclose(found[INNER], np.abs(leaf("params/blocks/0/norm1/scale")))
    both = np.abs(leaf("params/blocks/0/norm2/scale")) + np.abs(leaf("params/stem/norm/scale"))
    np.testing.assert_allclose(found[SHARED], both)


def test_taylor_is_taken_at_the_norms(groups):
    gradients = jax.tree.map(jnp.cos, VARIABLES)
    found = structure.taylor(groups, VARIABLES, gradients)
    sums = 0
    for name in ("scale", "bias"):
        w = leaf(f"params/blocks/0/norm1/{name}")
        sums = sums + w * np.cos(w)
    np.testing.assert_allclose(found[INNER], sums**2, rtol=1e-5)


@pytest.mark.slow
def test_taylor_predicts_the_change_of_the_loss(groups):
    def loss(gate):
        params = jax.tree.map(lambda x: x, PARAMS)
        norm = dict(params["blocks"][0]["norm1"])
        norm = {name: own * gate for name, own in norm.items()}
        blocks = {**params["blocks"], 0: {**params["blocks"][0], "norm1": norm}}
        return jnp.sum(jnp.sin(apply({**params, "blocks": blocks}, IMAGES)))

    gate = jnp.ones(16)
    slope = jax.grad(loss)(gate)
    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, IMAGES))))(PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, STATE)
    found = structure.taylor(groups, VARIABLES, {"params": gradients, "state": zeros})
    np.testing.assert_allclose(found[INNER], slope**2, rtol=1e-3, atol=1e-7)


def test_fpgm_is_the_sum_of_distances(groups):
    found = structure.fpgm(groups, VARIABLES)
    kernel = leaf("params/blocks/0/conv1/kernel").reshape(-1, 16).T
    distances = [sum(np.linalg.norm(a - b) for b in kernel) for a in kernel]
    np.testing.assert_allclose(found[INNER], distances, rtol=1e-6)


def made(*sizes):
    return Groups(None, [Group(f"g{i}", size, (), ()) for i, size in enumerate(sizes)], [], {})


SIZES = st.lists(st.integers(2, 9), min_size=1, max_size=4)


@given(sizes=SIZES, density=st.floats(0.05, 1), floor=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_is_kept_has_the_best_scores(sizes, density, floor, seed):
    groups, rng = made(*sizes), np.random.default_rng(seed)
    scores = {name: rng.integers(0, 4, group.size).astype(float) for name, group in groups.items()}
    uniform = structure.keep_uniform(groups, scores, density, floor=floor)
    ranked = structure.keep_global(groups, scores, density, floor=floor)
    least = {name: max(1, round(floor * group.size)) for name, group in groups.items()}
    for name, group in groups.items():
        assert uniform[name].sum() == max(1, round(max(density, floor) * group.size))
        assert ranked[name].sum() >= least[name]
        for kept in (uniform[name], ranked[name]):
            worst = min(zip(scores[name][kept], -np.flatnonzero(kept), strict=True))
            lost = zip(scores[name][~kept], -np.flatnonzero(~kept), strict=True)
            assert all(worst > other for other in lost), "ties keep the lower index"
    total = sum(own.sum() for own in ranked.values())
    assert total == max(round(density * sum(sizes)), sum(least.values()))


FRACTION = st.floats(0, 1)
BOUNDS = st.lists(st.tuples(FRACTION, FRACTION).map(sorted), min_size=4, max_size=4)


@given(SIZES, st.floats(0.05, 1), BOUNDS, st.booleans(), st.integers(0, 99))
def test_bounds_hold_and_the_best_of_what_they_allow_stays(sizes, density, bounds, each, seed):
    groups, rng = made(*sizes), np.random.default_rng(seed)
    scores = {name: rng.integers(0, 4, group.size).astype(float) for name, group in groups.items()}
    # A mapping that leaves the last group out, or one number for all.
    low, high = (
        {f"g{i}": own[k] for i, own in enumerate(bounds[: len(sizes) - 1])} for k in (0, 1)
    )
    floor, ceiling = (low, high) if each else bounds[0]
    least, most = {}, {}
    for name, group in groups.items():
        own = (low.get(name, 0.0), high.get(name, 1.0)) if each else bounds[0]
        least[name] = max(1, round(own[0] * group.size))
        most[name] = max(least[name], round(own[1] * group.size))
    uniform = structure.keep_uniform(groups, scores, density, floor=floor, ceiling=ceiling)
    ranked = structure.keep_global(groups, scores, density, floor=floor, ceiling=ceiling)
    for name, group in groups.items():
        wanted = min(max(round(density * group.size), least[name]), most[name])
        assert uniform[name].sum() == wanted
        assert least[name] <= ranked[name].sum() <= most[name]
    total = sum(own.sum() for own in ranked.values())
    wanted = max(round(density * sum(sizes)), sum(least.values()))
    assert total == min(wanted, sum(most.values()))
    order = {name: [(x, -i) for i, x in enumerate(own)] for name, own in scores.items()}
    kept, lost = (
        {
            name: [x for x, stays in zip(order[name], ranked[name]) if stays == flag]
            for name in groups
        }
        for flag in (True, False)
    )
    for i, one in enumerate(groups):
        assert min(kept[one]) > max(lost[one], default=(-1, 0)), "ties keep the lower index"
        for j, other in enumerate(groups):
            if len(kept[one]) > least[one] and len(kept[other]) < most[other]:
                worst, best = min(kept[one])[0], max(lost[other])[0]
                assert worst > best or (worst == best and i <= j), "an exchange would be better"


def test_ties_follow_the_groups_and_not_the_order_of_the_scores():
    """Scores that a jitted function returns are sorted by name."""
    names = ["b", "a"]
    groups = Groups(None, [Group(name, 2, (), ()) for name in names], [], {})
    scores = jax.jit(lambda: {name: jnp.ones(2) for name in names})()
    assert list(scores) == ["a", "b"]
    keep = structure.keep_global(groups, jax.tree.map(np.asarray, scores), 0.75)
    assert {name: own.tolist() for name, own in keep.items()} == {
        "b": [True, True],
        "a": [True, False],
    }


def test_ignored_groups_stay_whole_and_out_of_the_ranking():
    groups = made(4, 4, 4)
    scores = {name: np.arange(4.0) + 10 * int(name[1]) for name in groups}
    keep = structure.keep_global(groups, scores, 0.5, ignore=lambda group: group.name == "g2")
    assert {name: own.tolist() for name, own in keep.items()} == {
        "g0": [False, False, False, True],
        "g1": [False, True, True, True],
    }


def test_a_limit_holds_with_bounds_and_whole_groups(groups):
    scores = structure.filter_norms(groups, VARIABLES)
    limit = 0.6 * structure.count_parameters(groups.plan({}))

    def last(group):
        return "blocks/2" in group.name

    keep = structure.keep_within(
        groups, scores, limit, structure.count_parameters,
        floor={INNER: 0.75}, ceiling={SHARED: 0.25}, ignore=last, multiple=4,
    )  # fmt: skip
    assert set(keep) == {name for name in groups if not last(groups[name])}
    assert structure.count_parameters(groups.plan(keep, multiple=4)) <= limit
    assert keep[INNER].sum() >= 12 and keep[SHARED].sum() <= 4


def test_a_global_ranking_compares_groups():
    groups = made(3, 3)
    scores = {"g0": np.array([9.0, 8.0, 7.0]), "g1": np.array([1.0, 2.0, 3.0])}
    kept = structure.keep_global(groups, scores, 4 / 6)
    assert [own.tolist() for own in kept.values()] == [[True] * 3, [False, False, True]]
    equal = structure.normalized(scores)
    np.testing.assert_allclose([own.mean() for own in equal.values()], 1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_limit_is_met_and_used(groups, share):
    scores = structure.normalized(structure.filter_norms(groups, VARIABLES))
    whole = groups.plan({})
    limit = share * structure.count_parameters(whole)
    keep = structure.keep_within(groups, scores, limit, structure.count_parameters, multiple=1)
    plan = groups.plan(keep, multiple=1)
    count = structure.count_parameters(plan)
    params = plan.compact(VARIABLES)["params"]
    assert count == sum(leaf.size for leaf in jax.tree.leaves(params)) <= limit
    # One more channel of the ranking would be too much.
    flat = np.concatenate(list(scores.values()))
    lost = np.concatenate([~own for own in keep.values()])
    best = np.flatnonzero(lost)[np.argmax(flat[lost])]
    ends = np.cumsum([0] + [len(own) for own in scores.values()])
    at = int(np.searchsorted(ends, best, side="right")) - 1
    more = {name: own.copy() for name, own in keep.items()}
    more[list(scores)[at]][best - ends[at]] = True
    assert structure.count_parameters(groups.plan(more, multiple=1)) > limit


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: structure.keep_global(g, {"x": np.ones(3)}, 0.5), "x: not a group"),
        (lambda g: structure.keep_global(g, {"g0": np.ones(4)}, 0.5), "must be 3 finite numbers"),
        (lambda g: structure.keep_global(g, {"g0": np.full(3, np.nan)}, 0.5), "3 finite numbers"),
        (lambda g: structure.keep_global(g, {}, 0.5), "must name at least one group"),
        (lambda g: structure.keep_uniform(g, {"g0": np.ones(3)}, 0.0), "`density` must lie in"),
        (
            lambda g: structure.keep_uniform(g, {"g0": np.ones(3)}, 0.5, floor=2.0),
            "g0: 2.0 is not in",
        ),
        (
            lambda g: structure.keep_global(g, {"g0": np.ones(3)}, 0.5, ceiling={"g1": 0.5}),
            "`ceiling` must be a fraction.*\n.*g1: not a group that is ranked",
        ),
        (
            lambda g: structure.keep_global(g, {"g0": np.ones(3)}, 0.5, floor=0.6, ceiling=0.5),
            "`floor` must not be above `ceiling`:\n.*g0: 0.6 and 0.5",
        ),
        (
            lambda g: structure.keep_global(g, {"g0": np.ones(3)}, 0.5, ignore=lambda group: False),
            "`ignore` must match some groups and not others, but matches none",
        ),
    ],
)
def test_bad_choices(call, message):
    with pytest.raises(ValueError, match=message):
        call(made(3))


def test_a_limit_below_the_floors(groups):
    scores = structure.filter_norms(groups, VARIABLES)
    with pytest.raises(ValueError, match="the cost of what the floors keep"):
        structure.keep_within(groups, scores, 10, structure.count_parameters)
