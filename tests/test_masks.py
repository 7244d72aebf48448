"""Masks are found wherever they sit, applied exactly, and made in one call with exact counts."""

import collections
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune
from jaxprune import budgets, masks, scores, sharding, stacks
from tests.support.reference import keep_count, largest

PARAMS = {
    "conv": {"kernel": np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)},
    "dense": {"kernel": np.random.default_rng(1).normal(size=(5, 7)).astype(np.float32)},
    "bias": np.ones(7, np.float32),
}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
SIZE = 3 * 4 * 5 + 5 * 7


def _agip(sparsity=0.6):
    # One mask update, at the first step.
    return jaxprune.agip_transform(sparsity, start=0, stop=0)


def _labels(params):
    return {"conv": {"kernel": "one"}, "dense": {"kernel": "two"}, "bias": "rest"}


PLACES = {
    "alone": _agip(),
    "optax.chain": optax.chain(optax.sgd(0.1), _agip()),
    "jaxprune.chain": jaxprune.chain(optax.adam(0.1), _agip()),
    "nested": optax.chain(optax.chain(optax.sgd(0.1), optax.chain(_agip()))),
    "MultiSteps": optax.MultiSteps(jaxprune.chain(optax.sgd(0.1), _agip()), 1),
    "inject_hyperparams": optax.inject_hyperparams(
        lambda learning_rate: jaxprune.chain(optax.sgd(learning_rate), _agip())
    )(learning_rate=0.1),
    "apply_if_finite": optax.apply_if_finite(jaxprune.chain(optax.sgd(0.1), _agip()), 3),
}


def _kernels(tree):
    return [np.asarray(tree["conv"]["kernel"]), np.asarray(tree["dense"]["kernel"])]


def _pattern(leaf):
    return jnp.sin(3.0 * jnp.arange(leaf.size).reshape(leaf.shape)) > 0


def _marked(state):
    """The state with a pattern in place of every mask that a transformation keeps."""

    def is_agip(node):
        return isinstance(node, jaxprune.AgipState)

    def mark(node):
        return node._replace(masks=jax.tree.map(_pattern, node.masks)) if is_agip(node) else node

    return jax.tree.map(mark, state, is_leaf=is_agip)


# ---- get_masks


@pytest.mark.parametrize("place", PLACES)
def test_get_masks_finds_the_transformation(place):
    state = PLACES[place].init(PARAMS)
    masks = jaxprune.get_masks(state)
    assert jax.tree.structure(masks) == jax.tree.structure(PARAMS)
    assert all(mask.dtype == bool and mask.all() for mask in jax.tree.leaves(masks))

    masks = jaxprune.get_masks(_marked(state))
    assert jax.tree.structure(masks) == jax.tree.structure(PARAMS)
    for mask, p in zip(_kernels(masks), _kernels(PARAMS), strict=True):
        np.testing.assert_array_equal(mask, _pattern(p))
    assert masks["bias"].shape == ()  # nothing is kept of a leaf that is never pruned


@pytest.mark.slow
def test_get_masks_after_an_update_are_the_zeros_of_the_parameters():
    optimizer = PLACES["jaxprune.chain"]
    gradients = jax.tree.map(lambda p: jnp.cos(7 * p), PARAMS)
    updates, state = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    params, masks = optax.apply_updates(PARAMS, updates), jaxprune.get_masks(state)
    assert sum(int(mask.sum()) for mask in _kernels(masks)) == keep_count(SIZE, 0.6)
    for mask, p in zip(_kernels(masks), _kernels(params), strict=True):
        np.testing.assert_array_equal(mask, p != 0)


def test_get_masks_through_masked_fills_in_what_is_not_seen():
    seen = {"conv": {"kernel": True}, "dense": {"kernel": False}, "bias": False}
    state = optax.chain(optax.sgd(0.1), optax.masked(_agip(), seen)).init(PARAMS)
    masks = jaxprune.get_masks(_marked(state))
    assert jax.tree.structure(masks) == jax.tree.structure(PARAMS)
    np.testing.assert_array_equal(masks["conv"]["kernel"], _pattern(PARAMS["conv"]["kernel"]))
    for unseen in (masks["dense"]["kernel"], masks["bias"]):
        assert unseen.shape == () and bool(unseen)


def test_get_masks_merges_the_parts_of_a_partition():
    parts = {
        "one": jaxprune.chain(optax.sgd(0.1), _agip(0.5)),
        "two": jaxprune.chain(optax.adam(0.1), _agip(0.9)),
        "rest": optax.sgd(0.1),
    }
    labels = {"conv": {"kernel": "one"}, "dense": {"kernel": "two"}, "bias": "rest"}
    masks = jaxprune.get_masks(_marked(optax.partition(parts, labels).init(PARAMS)))
    assert jax.tree.structure(masks) == jax.tree.structure(PARAMS)
    for mask, p in zip(_kernels(masks), _kernels(PARAMS), strict=True):
        np.testing.assert_array_equal(mask, _pattern(p))
    assert masks["bias"].shape == () and bool(masks["bias"])
    # Scalar masks are good enough for `apply_masks`.
    applied = jaxprune.apply_masks(PARAMS, masks)
    np.testing.assert_array_equal(applied["bias"], PARAMS["bias"])


def test_get_masks_of_two_transformations_on_the_same_leaves_is_what_both_keep():
    state = (_agip().init(PARAMS), _agip().init(PARAMS))
    one, two = (jax.tree.map(lambda p, s=s: jnp.sin(s * p) > 0, PARAMS) for s in (3, 5))
    state = (state[0]._replace(masks=one), state[1]._replace(masks=two))
    masks = jaxprune.get_masks(state)
    for mask, a, b in zip(*map(jax.tree.leaves, (masks, one, two)), strict=True):
        assert (mask == (a & b)).all()


def _n(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


BRANCHES = {"m": {"a": _n(0, 8, 8), "c": _n(1, 8, 8)}, "h": {"k": _n(2, 8, 8)}}
MAGNITUDE = jaxprune.magnitude_transform(0.5, start=0, stop=0)
RIGL = jaxprune.rigl_transform(0.75, every=2, start=0, stop=2)
WHOLE_BRANCHES = {  # one flag or label for a whole branch
    "partition": optax.partition(
        {"x": jaxprune.chain(optax.sgd(0.1), MAGNITUDE), "y": jaxprune.chain(optax.sgd(0.1), RIGL)},
        {"m": "x", "h": "y"},
    ),
    "masked": jaxprune.chain(
        optax.sgd(0.1),
        optax.masked(MAGNITUDE, {"m": True, "h": False}),
        optax.masked(RIGL, {"m": False, "h": True}),
    ),
}
ONE_BRANCH = {
    "partition": optax.partition(
        {"x": jaxprune.chain(optax.sgd(0.1), MAGNITUDE), "y": optax.sgd(0.1)}, {"m": "x", "h": "y"}
    ),
    "masked": jaxprune.chain(optax.sgd(0.1), optax.masked(MAGNITUDE, {"m": True, "h": False})),
}


def _trained(optimizer, params=BRANCHES, steps=3):
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_BRANCHES)
def test_get_masks_merges_whole_branches(name):
    params, state = _trained(WHOLE_BRANCHES[name])
    masks = jaxprune.get_masks(state)
    chex.assert_trees_all_equal(masks, jax.tree.map(lambda leaf: leaf != 0, params))
    assert int(masks["m"]["a"].sum() + masks["m"]["c"].sum()) == 64
    assert int(masks["h"]["k"].sum()) == 16
    assert jaxprune.check(params, state).ok
    others = jax.tree.map(_pattern, BRANCHES)
    chex.assert_trees_all_equal(jaxprune.get_masks(jaxprune.set_masks(state, others)), others)


def test_get_masks_merges_labels_of_branches_and_of_leaves():
    params = {"m": BRANCHES["m"], "rest": [{"k": _n(3, 4, 4)}, (_n(4, 4, 4), None)], "empty": {}}
    flags = [
        {"m": {"a": True, "c": False}, "rest": False, "empty": True},
        {"m": {"a": False, "c": True}, "rest": [False, True], "empty": False},
        {"m": False, "rest": False, "empty": False},
    ]
    state = tuple(optax.masked(MAGNITUDE, own).init(params) for own in flags[:2])
    masks = jaxprune.get_masks(state)
    assert masks["m"]["a"].shape == masks["m"]["c"].shape == (8, 8)
    assert masks["rest"][0].shape == () and bool(masks["rest"][0])
    assert masks["rest"][1][0].shape == (4, 4) and masks["rest"][1][1] is None
    assert masks["empty"] == {}
    jaxprune.apply_masks(params, masks)


@pytest.mark.parametrize("name", ONE_BRANCH)
def test_a_branch_that_nothing_prunes_has_one_mask(name):
    params, state = _trained(ONE_BRANCH[name])
    masks = jaxprune.get_masks(state)
    assert masks["h"].shape == () and bool(masks["h"])
    assert jaxprune.check(params, state).ok
    chex.assert_trees_all_equal(jaxprune.apply_masks(params, masks), params)
    # Masks of the state are good for the whole model, and the reverse.
    chex.assert_trees_all_equal(jaxprune.set_masks(state, masks), state)
    whole = jax.tree.map(lambda leaf: leaf != 0, params)
    chex.assert_trees_all_equal(jaxprune.set_masks(state, whole), state)
    fixed = jaxprune.fixed_mask_transform(masks).init(params)
    chex.assert_trees_all_equal(jaxprune.get_masks(fixed)["m"], masks["m"])
    _, further = jaxprune.prune(params, 0.8, masks=masks)
    assert not (further["m"]["a"] & ~masks["m"]["a"]).any()
    with pytest.raises(ValueError, match="h/k: pruned, but the optimizer does not prune it"):
        jaxprune.set_masks(state, further)


def test_masks_of_different_models_do_not_merge():
    states = MAGNITUDE.init({"a": _n(0, 2, 2)}), MAGNITUDE.init({"b": _n(0, 2, 2)})
    with pytest.raises(ValueError, match="masks of one tree of parameters.*: 'a'; 'b'. Read"):
        jaxprune.get_masks(states)


@pytest.mark.slow
def test_get_masks_from_nnx():
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    before = nnx.state(model, nnx.Param)
    optimizer = nnx.Optimizer(model, jaxprune.chain(optax.sgd(0.1), _agip(0.5)), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(lambda p: p + 0.1, before))
    masks = jaxprune.get_masks(optimizer.opt_state)
    kernels = [masks["layers"][i]["kernel"] for i in (0, 1)]
    assert sum(int(jnp.sum(kernel[...])) for kernel in kernels) == keep_count(24 + 18, 0.5)

    pruned = jaxprune.apply_masks(before, masks)
    assert jax.tree.structure(pruned) == jax.tree.structure(before)
    leaves = map(jax.tree.leaves, (masks, pruned, before, nnx.state(model, nnx.Param)))
    for mask, after, old, trained in zip(*leaves, strict=True):
        np.testing.assert_array_equal(after, np.where(mask, old, 0))
        assert (trained[~mask] == 0).all()


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.identity()])
def test_get_masks_without_masks(optimizer):
    with pytest.raises(ValueError, match=r"`opt_state` holds no masks.*\(type \w+\)\. Add one"):
        jaxprune.get_masks(optimizer.init(PARAMS))


# ---- set_masks


@pytest.mark.parametrize("place", PLACES)
def test_set_masks_is_undone_by_get_masks(place):
    state = PLACES[place].init(PARAMS)
    masks = jax.tree.map(_pattern, PARAMS) | {"bias": True}
    changed = jaxprune.set_masks(state, masks)
    assert jax.tree.map(jnp.result_type, changed) == jax.tree.map(jnp.result_type, state)
    found = jaxprune.get_masks(changed)
    for mask, p in zip(_kernels(found), _kernels(PARAMS), strict=True):
        np.testing.assert_array_equal(mask, _pattern(p))
    assert found["bias"].shape == ()
    # Only masks have changed.
    same = jax.tree.map(np.array_equal, changed, _marked(state))
    assert all(jax.tree.leaves(same))


def test_set_masks_reaches_the_parts_of_a_partition():
    parts = {"one": _agip(0.5), "two": _agip(0.9), "rest": optax.sgd(0.1)}
    state = optax.partition(parts, _labels(PARAMS)).init(PARAMS)
    masks = jax.tree.map(_pattern, PARAMS) | {"bias": jnp.ones(7, bool)}
    found = jaxprune.get_masks(jaxprune.set_masks(state, masks))
    for mask, p in zip(_kernels(found), _kernels(PARAMS), strict=True):
        np.testing.assert_array_equal(mask, _pattern(p))


def test_scalar_masks_fill_a_leaf():
    state = jaxprune.fixed_mask_transform().init(PARAMS)
    masks = {"conv": {"kernel": False}, "dense": {"kernel": np.array(True)}, "bias": True}
    found = jaxprune.get_masks(jaxprune.set_masks(state, masks))
    assert found["conv"]["kernel"].shape == (3, 4, 5) and not found["conv"]["kernel"].any()
    assert found["dense"]["kernel"].shape == (5, 7) and found["dense"]["kernel"].all()


def test_masks_of_prune_fit_and_the_next_update_zeroes():
    tx = optax.chain(optax.adam(0.1), jaxprune.fixed_mask_transform())
    _, masks = jaxprune.prune(PARAMS, 0.5)
    update = jax.jit(tx.update)
    params, state = PARAMS, jaxprune.set_masks(tx.init(PARAMS), masks)
    for _ in range(2):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for mask, p in zip(_kernels(masks), _kernels(params), strict=True):
        np.testing.assert_array_equal(mask, p != 0)
    assert update._cache_size() == 1, "new masks must not compile anything"


def test_masks_are_matched_by_path_and_copied():
    state = jaxprune.fixed_mask_transform().init(PARAMS)
    masks = jax.tree.map(_pattern, PARAMS) | {"bias": True}
    # JAX sorts the keys of a dict, but not these.
    masks = collections.OrderedDict((name, masks[name]) for name in ("dense", "bias", "conv"))
    changed = jaxprune.set_masks(state, masks)
    found = jaxprune.get_masks(changed)
    for mask, p in zip(_kernels(found), _kernels(PARAMS), strict=True):
        np.testing.assert_array_equal(mask, _pattern(p))
    jax.jit(lambda s: s, donate_argnums=0)(changed)
    assert masks["conv"]["kernel"].any(), "the caller's masks were donated"


def test_set_masks_keeps_devices():
    mesh = sharding.make_mesh()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(jaxprune.fixed_mask_transform().init(PARAMS), whole)
    masks = jax.tree.map(_pattern, PARAMS) | {"bias": True}
    changed = jaxprune.set_masks(state, masks)
    assert {mask.sharding for mask in jax.tree.leaves(changed.masks)} == {whole}


def test_set_masks_in_nnx():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.fixed_mask_transform())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    masks = {"kernel": np.arange(24).reshape(4, 6) % 3 == 0, "bias": True}
    optimizer.opt_state = nnx.data(jaxprune.set_masks(optimizer.opt_state, masks))
    optimizer.update(model, jax.tree.map(lambda p: p + 0.1, nnx.state(model, nnx.Param)))
    np.testing.assert_array_equal(np.asarray(model.kernel) != 0, masks["kernel"])


def test_set_masks_names_every_misfit():
    state = jaxprune.fixed_mask_transform().init(PARAMS)
    off = jnp.zeros(7, bool).at[0].set(True)
    masks = {"conv": {"kernel": jnp.ones((3, 4), bool)}, "bias": off, "new": True}
    with pytest.raises(ValueError, match="`masks` must belong to the model") as error:
        jaxprune.set_masks(state, masks)
    for line in (
        "conv/kernel: shape (3, 4), but (3, 4, 5) in the state",
        "dense/kernel: no mask",
        "bias: pruned, but the optimizer does not prune it",
        "new: a mask without a leaf",
    ):
        assert line in str(error.value)
    numbers = jax.tree.map(jnp.ones_like, PARAMS)
    with pytest.raises(ValueError, match="conv/kernel: float32, must be bool"):
        jaxprune.set_masks(state, numbers)
    with pytest.raises(ValueError, match="holds no masks"):
        jaxprune.set_masks(optax.sgd(0.1).init(PARAMS), masks)


# ---- apply_masks


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


def test_apply_masks_keeps_values_dtypes_and_containers():
    tree = Pair(jnp.array([1.5, -2.0, jnp.nan], jnp.bfloat16), [jnp.array([[3, 4]], jnp.int8)])
    masks = Pair(jnp.array([True, False, False]), [jnp.array([[False, True]])])
    result = jaxprune.apply_masks(tree, masks)
    assert isinstance(result, Pair)
    assert (result.left.dtype, result.right[0].dtype) == (jnp.bfloat16, jnp.int8)
    assert result.left.tolist() == [1.5, 0.0, 0.0]
    assert result.right[0].tolist() == [[0, 4]]


@pytest.mark.parametrize("mask", [True, False])
def test_scalar_masks_are_for_whole_leaves(mask):
    result = jaxprune.apply_masks({"w": jnp.full((2, 3), 7.0)}, {"w": jnp.array(mask)})
    assert (result["w"] == (7.0 if mask else 0.0)).all()


def test_scalar_masks_are_for_whole_branches():
    zeroed = jaxprune.apply_masks(BRANCHES, {"m": jnp.array(False), "h": True})
    chex.assert_trees_all_equal(zeroed["m"], jax.tree.map(jnp.zeros_like, BRANCHES["m"]))
    chex.assert_trees_all_equal(zeroed["h"], BRANCHES["h"])
    chex.assert_trees_all_equal(jaxprune.apply_masks(BRANCHES, True), BRANCHES)
    state = jaxprune.fixed_mask_transform().init(BRANCHES)
    masks = jaxprune.get_masks(jaxprune.set_masks(state, {"m": False, "h": {"k": True}}))
    assert not masks["m"]["a"].any() and not masks["m"]["c"].any() and masks["h"]["k"].all()
    # An array is the mask of one leaf, and a branch must be there.
    wrong = {"m": jnp.ones((8, 8), bool), "h": True, "new": True}
    with pytest.raises(ValueError) as error:
        jaxprune.apply_masks(BRANCHES, wrong)
    assert str(error.value).splitlines()[1:] == [
        "  m/a: no mask",
        "  m/c: no mask",
        "  m: a mask without a leaf",
        "  new: a mask without a leaf",
    ]


def test_apply_masks_under_jit():
    masks = jax.tree.map(lambda p: p > 0, PARAMS)
    eager, jitted = (
        jaxprune.apply_masks(PARAMS, masks),
        jax.jit(jaxprune.apply_masks)(PARAMS, masks),
    )
    for a, b, p in zip(*map(jax.tree.leaves, (eager, jitted, PARAMS)), strict=True):
        np.testing.assert_array_equal(a, np.maximum(p, 0))
        np.testing.assert_array_equal(b, a)


def test_apply_masks_names_every_leaf():
    tree = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": jnp.zeros(2)}
    masks = {"a": jnp.ones((3, 2), bool), "c": jnp.ones(2, bool), "d": jnp.array(True)}
    with pytest.raises(ValueError) as error:
        jaxprune.apply_masks(tree, masks)
    assert str(error.value).splitlines() == [
        "`masks` must have the paths and shapes of `tree`:",
        "  b: no mask",
        "  d: a mask without a leaf",
        "  a: shape (2, 3), but mask (3, 2)",
    ]


def test_apply_masks_does_not_broadcast():
    with pytest.raises(ValueError, match=r"a: shape \(2, 3\), but mask \(3,\)"):
        jaxprune.apply_masks({"a": jnp.zeros((2, 3))}, {"a": jnp.ones(3, bool)})


# ---- prune


STATISTICS = jax.tree.map(lambda p: jnp.abs(jnp.cos(11 * p)), PARAMS)
SCORES = {
    "magnitude": (scores.magnitude, lambda w, s: np.abs(w)),
    "gradient": (scores.gradient, lambda w, s: s),
    "taylor": (scores.taylor, lambda w, s: np.abs(w) * s),
}


@pytest.mark.parametrize(
    ("name", "sparsity"),
    [("magnitude", 0.0), ("magnitude", 0.72), ("gradient", 0.3), ("taylor", 0.95)],
)
def test_prune_keeps_the_largest_scores(name, sparsity):
    score, formula = SCORES[name]
    pruned, masks = jaxprune.prune(PARAMS, sparsity, score=score, statistics=STATISTICS)
    keep = keep_count(SIZE, sparsity)
    assert sum(int(mask.sum()) for mask in _kernels(masks)) == keep
    values = [formula(w, s) for w, s in zip(_kernels(PARAMS), _kernels(STATISTICS), strict=True)]
    floors = [max(1, keep_count(n, sparsity) // 10) for n in (60, 35)]
    wanted = largest(values, keep, floors)
    kernels = zip(_kernels(masks), _kernels(pruned), _kernels(PARAMS), wanted, strict=True)
    for mask, after, before, want in kernels:
        np.testing.assert_array_equal(mask, want)
        np.testing.assert_array_equal(after, np.where(mask, before, 0))
    assert masks["bias"].shape == (7,) and bool(masks["bias"].all())
    assert (pruned["bias"] == PARAMS["bias"]).all()


def test_prune_with_a_uniform_budget_and_with_random_scores():
    for score in (scores.magnitude, scores.random(0)):
        _, masks = jaxprune.prune(PARAMS, 0.7, score=score, budget=budgets.uniform)
        counts = [int(mask.sum()) for mask in _kernels(masks)]
        assert counts == [keep_count(60, 0.7), keep_count(35, 0.7)]


def test_prune_with_a_custom_budget():
    def rule(shapes, sparsity):
        assert (list(shapes.values()), sparsity) == ([(3, 4, 5), (5, 7)], 0.5)
        assert [path.partition("/")[2] for path in shapes] == ["kernel", "kernel"]
        return budgets.Budget(30, (0, 30))

    _, masks = jaxprune.prune(PARAMS, 0.5, budget=rule)
    assert [int(mask.sum()) for mask in _kernels(masks)] == [0, 30]


@pytest.mark.parametrize(
    "prunable",
    [
        lambda path, leaf: path == "bias",
        {"conv": {"kernel": False}, "dense": {"kernel": False}, "bias": True},
    ],
)
def test_prune_chosen_leaves_only(prunable):
    pruned, masks = jaxprune.prune(PARAMS, 0.5, prunable=prunable)
    # All equal: the first ones stay.
    assert masks["bias"].tolist() == [True] * 3 + [False] * 4
    assert pruned["bias"].tolist() == [1.0] * 3 + [0.0] * 4
    assert all(mask.all() for mask in _kernels(masks))
    assert (pruned["dense"]["kernel"] == PARAMS["dense"]["kernel"]).all()


def test_prune_an_nnx_state():
    state = nnx.state(nnx.Linear(6, 5, rngs=nnx.Rngs(0)), nnx.Param)
    pruned, masks = jaxprune.prune(state, 0.5)
    assert jax.tree.structure(pruned) == jax.tree.structure(state)
    assert [int(mask.sum()) for mask in jax.tree.leaves(masks)] == [5, 15]
    wanted = largest([np.abs(state["kernel"].get_value())], 15)[0]
    np.testing.assert_array_equal(masks["kernel"].get_value(), wanted)


@pytest.mark.parametrize("kind", ["score", "statistics"])
def test_scores_are_matched_by_path(kind):
    """Text keys sort "10" before "2": the tree of a file has another order than a list."""
    params = [jnp.full((2, 2), 1.0) for _ in range(12)]
    ranked = {str(number): jnp.full((2, 2), 12.0 - number) for number in range(12)}
    options = {"score": ranked} if kind == "score" else {"statistics": ranked}
    options = {"score": scores.gradient} | options
    _, masks = jaxprune.prune(params, 0.5, budget=budgets.global_budget(0.0), **options)
    # Each leaf keeps one weight at least, so the best four and a half are whole.
    assert [i for i, mask in enumerate(masks) if mask.all()] == [0, 1, 2, 3]


def test_prune_under_jit():
    pruned, masks = jax.jit(lambda params: jaxprune.prune(params, 0.6))(PARAMS)
    eager = jaxprune.prune(PARAMS, 0.6)
    for a, b in zip(*map(jax.tree.leaves, ((pruned, masks), eager)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"`sparsity` must lie in \[0, 1\), but is"):
        jaxprune.prune(PARAMS, sparsity)


@pytest.mark.parametrize(
    ("params", "arguments", "message"),
    [
        ({"bias": jnp.ones(3)}, {}, "`prunable` matches no leaf"),
        (
            {"w": jnp.ones((2, 2))},
            {"statistics": {"v": jnp.ones((2, 2))}},
            "`statistics` must have",
        ),
        ({"w": jnp.ones((2, 2), jnp.int8)}, {"prunable": {"w": True}}, "w: shape .*dtype int8"),
        ({"a": jnp.ones((1, 2)), "b": jnp.ones((1, 2))}, {}, "Lower `sparsity` or `floor`"),
        ({}, {}, "but has no leaves"),
    ],
)
def test_prune_errors(params, arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.prune(params, 0.75, **arguments)


def test_a_parameter_named_masks_is_not_a_state_field():
    params = {"masks": {"kernel": jnp.ones((4, 4))}, "trace": {"kernel": jnp.ones((4, 4))}}
    tx = jaxprune.chain(optax.sgd(0.1, momentum=0.9), jaxprune.agip_transform(0.5, stop=4))
    masks = jaxprune.get_masks(tx.init(params))
    chex.assert_trees_all_equal_structs(masks, params)


def test_paths_that_collide_are_an_error():
    tree = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"must have different paths(.|\n)*a/b"):
        jaxprune.apply_masks(tree, tree)


@pytest.mark.parametrize("score", [scores.gradient, scores.taylor])
def test_prune_says_that_a_score_needs_statistics(score):
    with pytest.raises(ValueError, match="`statistics` is missing"):
        jaxprune.prune({"kernel": jnp.ones((2, 2))}, 0.5, score=score)


# ---- whole modules, and modules that can be called


@struct.dataclass
class Module:
    """What a module of Equinox is to JAX: arrays, functions and settings, and callable."""

    weight: Any
    bias: Any
    activation: Any = jax.nn.relu
    mode: Any = "same"
    rate: Any = 0.5
    training: Any = False

    def __call__(self, *arguments):
        raise AssertionError("a tree was called")


def _module():
    return Module(jnp.array([[3.0, -1.0], [2.0, 0.5]]), jnp.ones(2))


def _arrays(tree):
    """As `equinox.filter(tree, equinox.is_array)`."""
    return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "shape") else None, tree)


KEPT = [[True, False], [True, False]]


def test_prune_a_whole_module():
    module = _module()
    pruned, masks = jaxprune.prune(module, 0.5)
    assert pruned.weight.tolist() == [[3.0, 0.0], [2.0, 0.0]]
    assert masks.weight.tolist() == KEPT and masks.bias.tolist() == [True, True]
    for name in ("activation", "mode", "rate", "training"):
        assert getattr(pruned, name) is getattr(module, name), name
        assert getattr(masks, name).shape == () and bool(getattr(masks, name)), name
    assert jax.tree.structure(pruned) == jax.tree.structure(module)


@pytest.mark.parametrize("make", [lambda tree: tree, _arrays], ids=["whole", "arrays"])
def test_callable_trees_are_trees(make):
    """As `score`, `statistics`, `prunable` and `masks`; no module is ever called."""
    module, ones = _module(), make(_module())
    # The least magnitudes first.
    score = make(module.replace(weight=-jnp.abs(module.weight)))
    _, masks = jaxprune.prune(module, 0.5, score=score)
    assert masks.weight.tolist() == [[False, True], [False, True]]
    _, masks = jaxprune.prune(module, 0.5, score=scores.gradient, statistics=score)
    assert masks.weight.tolist() == KEPT
    flags = jax.tree.map(lambda _: False, ones).replace(bias=True)
    pruned, masks = jaxprune.prune(module, 0.5, prunable=flags)
    assert masks.bias.tolist() == [True, False] and masks.weight.all()
    before = jax.tree.map(lambda _: True, ones).replace(
        weight=jnp.array([[False, True], [True, True]])
    )
    _, masks = jaxprune.prune(module, 0.25, masks=before)
    assert masks.weight.tolist() == [[False, True], [True, True]]


def test_prune_a_whole_module_in_rounds():
    def score(module):
        assert module.activation is jax.nn.relu and module.rate == 0.5
        return module.replace(weight=jnp.abs(module.weight))

    pruned, masks = jaxprune.prune_in_rounds(_module(), 0.5, score, rounds=2)
    assert masks.weight.tolist() == KEPT and pruned.mode == "same"
    with pytest.raises(ValueError, match="`score` must be a function .*, but is a tree"):
        jaxprune.prune_in_rounds(_module(), 0.5, _module(), rounds=2)


MASKS = {
    "whole": lambda module, masks: masks,
    "arrays": lambda module, masks: _arrays(module.replace(weight=masks.weight, bias=masks.bias)),
    "scalars": lambda module, masks: jax.tree.map(lambda _: True, module).replace(
        weight=masks.weight
    ),
    "functions": lambda module, masks: module.replace(
        weight=masks.weight, bias=True, rate=True, training=True
    ),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("make", [lambda tree: tree, _arrays], ids=["whole", "arrays"])
def test_masks_of_modules_fit_modules_and_their_arrays(kind, make):
    module = make(_module())
    masks = MASKS[kind](_module(), jaxprune.prune(_module(), 0.5)[1])
    applied = jaxprune.apply_masks(module, masks)
    assert applied.weight.tolist() == [[3.0, 0.0], [2.0, 0.0]]
    for name in ("activation", "mode", "rate", "training"):
        assert getattr(applied, name) is getattr(module, name), name
    state = jaxprune.fixed_mask_transform(masks).init(module)
    assert state.masks.weight.tolist() == KEPT
    empty = jaxprune.fixed_mask_transform().init(module)
    assert jaxprune.set_masks(empty, masks).masks.weight.tolist() == KEPT
    # What the state gives back fits the whole module as well.
    found = jaxprune.get_masks(state)
    assert jaxprune.apply_masks(_module(), found).weight.tolist() == applied.weight.tolist()


def test_masks_of_a_module_are_checked_all_the_same():
    module, masks = _module(), jaxprune.prune(_module(), 0.5)[1]
    bad = masks.replace(activation=False, weight=jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"weight: shape \(2, 2\)(.|\n)*activation: custom_jvp"):
        jaxprune.apply_masks(module, bad)
    with pytest.raises(ValueError, match=r"activation: a mask without a leaf"):
        jaxprune.apply_masks(_arrays(module), masks.replace(activation=jnp.ones(2, bool)))
    with pytest.raises(ValueError, match="weight: no mask, but custom_jvp"):
        jaxprune.apply_masks(module, masks.replace(weight=jax.nn.relu))
    state = jaxprune.fixed_mask_transform().init(module)
    with pytest.raises(ValueError, match="weight: no mask, but custom_jvp"):
        jaxprune.set_masks(state, masks.replace(weight=jax.nn.relu))
    with pytest.raises(ValueError, match="weight: no mask, but custom_jvp"):
        jaxprune.fixed_mask_transform(masks.replace(weight=jax.nn.relu)).init(module)
    # None stands for all kept, as `equinox.filter` leaves it.
    state = jaxprune.set_masks(state, masks)
    assert jaxprune.set_masks(state, masks.replace(weight=None)).masks.weight.all()


@pytest.mark.slow
def test_train_an_equinox_module_with_the_masks_of_the_whole_one():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    model, masks = jaxprune.prune(model, 0.75)
    x, y = jnp.linspace(-1, 1, 64).reshape(16, 4), jnp.ones((16, 2))

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    for transform in (
        jaxprune.fixed_mask_transform(masks),
        jaxprune.magnitude_transform(
            0.75, stop=0, prunable=jax.tree.map(lambda m: m.ndim > 1, masks)
        ),
    ):
        optimizer = jaxprune.chain(optax.sgd(0.1, momentum=0.9), transform)
        trained, state = model, optimizer.init(eqx.filter(model, eqx.is_array))
        before = loss(model)[0]

        @eqx.filter_jit
        def step(model, state, optimizer=optimizer):
            updates, state = optimizer.update(
                loss(model)[1], state, eqx.filter(model, eqx.is_array)
            )
            return eqx.apply_updates(model, updates), state

        for _ in range(5):
            trained, state = step(trained, state)
        assert loss(trained)[0] < before
        kept = jaxprune.get_masks(state)
        for layer in (0, 1):
            weight, mask = trained.layers[layer].weight, masks.layers[layer].weight
            assert ((weight != 0) == mask).all()
            assert (kept.layers[layer].weight == mask).all()


def test_trees_are_matched_by_path_and_not_by_position():
    params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0]])}
    ordered = collections.OrderedDict(b=jnp.array([[0.0, 1.0]]), a=jnp.array([[2.0, 3.0]]))
    for options in ({"score": ordered}, {"score": scores.gradient, "statistics": ordered}):
        _, masks = jaxprune.prune(params, 0.25, **options)
        assert masks["a"].tolist() == [[True, True]] and masks["b"].tolist() == [[False, True]]
    before = collections.OrderedDict(b=jnp.zeros((1, 2), bool), a=jnp.ones((1, 2), bool))
    _, masks = jaxprune.prune(params, 0.5, masks=before)
    assert masks["a"].tolist() == [[True, True]] and masks["b"].tolist() == [[False, False]]


# ---- overlap


def test_overlap_counts_what_both_keep():
    rng = np.random.default_rng(0)
    one = {name: rng.random((8, 8)) < density for name, density in (("a", 0.5), ("b", 0.25))}
    other = {name: rng.random((8, 8)) < 0.5 for name in one}
    found = jaxprune.masks.overlap(one | {"bias": True}, other | {"bias": np.True_})
    shared = {name: (one[name] & other[name]).sum() for name in one}
    assert found.leaves == {name: shared[name] / one[name].sum() for name in one}
    assert found.total == sum(shared.values()) / sum(mask.sum() for mask in one.values())
    assert jaxprune.masks.overlap(one, one).total == 1
    full = {"bias": np.ones(100, bool)}
    assert jaxprune.masks.overlap(one | full, other | full) == found
    assert jaxprune.masks.overlap(full, full) == (1, {})
    # A scalar is the mask of its leaf, and nothing is kept of none.
    assert jaxprune.masks.overlap(one, {"a": True, "b": False}).leaves == {"a": 1, "b": 0}
    assert jaxprune.masks.overlap([np.zeros(3, bool)], [np.ones(3, bool)]).total == 0


def test_overlap_of_a_state_and_of_one_call():
    prune = jaxprune.magnitude_transform(0.5, stop=0)
    _, state = prune.update(PARAMS, prune.init(PARAMS), PARAMS)
    _, masks = jaxprune.prune(PARAMS, 0.75)
    found = jaxprune.masks.overlap(masks, jaxprune.get_masks(state))
    assert found.leaves.keys() == {"conv/kernel", "dense/kernel"} and found.total > 0.9


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": np.ones(3, bool)}, r"a: shapes \(2,\) and \(3,\)"),
        ({"b": np.ones(2, bool)}, "a: only in one of them\n  b: only in one of them"),
    ],
)
def test_overlap_of_different_models(other, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.masks.overlap({"a": np.ones(2, bool)}, other)
    with pytest.raises(ValueError, match="Call `masks.overlap` outside"):
        jax.jit(lambda masks: jaxprune.masks.overlap(masks, masks).total)(np.ones(2, bool))


# ---- sparsity by layer


def _stacked_masks():
    random = np.random.default_rng(3)
    return {"head": True, "layers": {"kernel": random.random((3, 5, 7)) < 0.4}, "w": np.eye(4) == 1}


def test_sparsities_are_those_of_numpy_and_compile_once():
    tree, traces = _stacked_masks(), []

    @jax.jit
    def measure(tree):
        traces.append(1)
        return masks.sparsities(tree, stacked=stacks.under("layers"))

    found = measure(tree)
    zeros = [float(np.mean(~layer)) for layer in tree["layers"]["kernel"]] + [0.75]
    names = [f"layers/kernel[{i}]" for i in range(3)] + ["w"]
    np.testing.assert_allclose([found[name] for name in names], zeros, rtol=1e-6)
    total = 1 - (tree["layers"]["kernel"].sum() + 4) / (3 * 5 * 7 + 16)
    np.testing.assert_allclose(found["total"], total, rtol=1e-6)
    assert found.keys() == {*names, "total"}
    assert all(value.dtype == jnp.float32 and value.shape == () for value in found.values())
    measure(jax.tree.map(lambda mask: ~np.asarray(mask) if np.ndim(mask) else mask, tree))
    assert len(traces) == 1


def test_sparsities_inside_the_step_are_those_after_it():
    optimizer = jaxprune.chain(
        optax.sgd(0.1), jaxprune.magnitude_transform(0.75, every=1, start=0, stop=3)
    )

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state, masks.sparsities(state)

    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(4):
        params, state, found = step(params, state)
    assert found.keys() == {"conv/kernel", "dense/kernel", "total"}  # the bias is never pruned
    rows = {row.path: row.sparsity for row in jaxprune.summarize(params).rows}
    for path in found.keys() - {"total"}:
        np.testing.assert_allclose(found[path], rows[path], rtol=1e-6)
    assert float(found["total"]) == pytest.approx(1 - keep_count(SIZE, 0.75) / SIZE)


def test_sparsities_of_many_entries_are_exact():
    """The sum of more than 2 ** 24 ones in float32 would stop there."""
    mask = np.ones(2**25 + 8, bool)
    mask[:8] = False
    found = masks.sparsities({"kernel": mask})
    assert float(found["total"]) == float(np.float32(8 / (2**25 + 8)))


def test_sparsities_under_vmap_and_split_over_devices():
    random = np.random.default_rng(0)
    many = {"kernel": random.random((4, 8, 3)) < 0.5}
    found = jax.vmap(masks.sparsities)(many)
    expected = 1 - many["kernel"].mean((1, 2))
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-6)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("layers",), (kind,), devices=jax.devices()[:4])
        spec = NamedSharding(mesh, PartitionSpec("layers"))
        with jax.set_mesh(mesh):
            placed = jax.device_put(many, spec)
            found = jax.jit(lambda m: masks.sparsities(m, stacked=stacks.under("")))(placed)
            assert found["kernel[0]"].sharding.is_fully_replicated
        np.testing.assert_allclose([found[f"kernel[{i}]"] for i in range(4)], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": jnp.ones(3), "b": jnp.ones((2, 2), bool)}, r"must be a tree of bools.*\n  a: float"),
        (optax.adam(0.1).init({"a": jnp.ones(3)}), r"must be a tree of bools(.|\n)*mu/a: float"),
        ({"a": True, "b": jnp.array(True)}, "no leaf has one: nothing is pruned"),
        ({"total": jnp.ones(2, bool)}, "must not have a leaf with the path `total`"),
    ],
)
def test_sparsities_of_other_trees_are_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        masks.sparsities(tree)


# ---- low-rank adapters


def _factors(kernel, rank=2, dtype=jnp.float32):
    random = np.random.default_rng(rank)
    *lead, rows, columns = kernel
    a, b = random.normal(size=(*lead, rows, rank)), random.normal(size=(*lead, rank, columns))
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((6, 4), (6, 4)), ((3, 6, 4), (3, 6, 4)), ((6, 2, 2), (6, 4)), ((3, 2, 3, 4), (3, 6, 4))],
    ids=["matrix", "stack", "heads", "stack of heads"],
)
def test_merging_keeps_zeros_and_adds_the_product(shape, matrix, dtype):
    kernel, mask = jnp.asarray(_pattern(jnp.zeros(shape)), dtype) * 0.7, _pattern(jnp.ones(shape))
    a, b = _factors(matrix, dtype=dtype)
    product = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    wanted = np.asarray(kernel, np.float64) + 0.5 * product.reshape(shape)
    for given in (None, mask):  # here the zeros of the kernel are those of the mask
        merged = jax.jit(masks.merge_low_rank)(kernel, a, b, scale=0.5, mask=given)
        assert merged.dtype == dtype and merged.shape == shape
        np.testing.assert_array_equal(np.asarray(merged)[~mask], 0)
        tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
        np.testing.assert_allclose(
            np.asarray(merged, np.float64)[mask], wanted[mask], rtol=tolerance, atol=tolerance
        )


def test_a_mask_keeps_weights_that_are_0():
    merged = masks.merge_low_rank(
        jnp.zeros((2, 2)), jnp.ones((2, 1)), jnp.ones((1, 2)), mask=jnp.eye(2, dtype=bool)
    )
    assert merged.tolist() == [[1, 0], [0, 1]]


def test_merging_rounds_once():
    """In bfloat16 the product alone would lose the small factor."""
    kernel, a = jnp.full((1, 1), -2.0, jnp.bfloat16), jnp.array([[1.0, 1.0]], jnp.bfloat16)
    b = jnp.array([[256.0], [1.0]], jnp.bfloat16)
    assert float(masks.merge_low_rank(kernel, a, b, scale=2**-7)[0, 0]) == 2**-7
    assert masks.merge_low_rank(kernel, a, b, scale=jnp.float32(1.0)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("kernel", "a", "b", "message"),
    [
        ((4, 6), (6, 2), (2, 4), r"`a @ b` must have the shape of `kernel`, but has \(6, 4\)"),
        ((6, 4), (6, 2), (3, 4), r"`a` and `b` must be .*`a` \(6, 2\), `b` \(3, 4\); transpose"),
        ((6, 4), (6,), (2, 4), r"`a` and `b` must be \[\.\.\., inputs, rank\]"),
        ((3, 6, 4), (2, 6, 1), (2, 1, 4), r"but has \(2, 6, 4\); the shapes are `kernel` \(3, 6"),
        ((3, 6, 4), (3, 6, 1), (1, 4), r"with the same axes before these"),
    ],
)
def test_factors_that_do_not_fit_are_refused(kernel, a, b, message):
    with pytest.raises(ValueError, match=message):
        masks.merge_low_rank(jnp.ones(kernel), jnp.ones(a), jnp.ones(b))


def test_other_masks_and_types_are_refused():
    kernel, a, b = jnp.ones((6, 4)), jnp.ones((6, 1)), jnp.ones((1, 4))
    with pytest.raises(ValueError, match=r"`mask` must have the shape of `kernel`, \(6, 4\), but"):
        masks.merge_low_rank(kernel, a, b, mask=jnp.ones((4, 6), bool))
    with pytest.raises(ValueError, match=r"must be floating point; convert these:\n  a: int"):
        masks.merge_low_rank(kernel, jnp.ones((6, 1), int), b)
