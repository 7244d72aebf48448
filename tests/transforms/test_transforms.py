"""Each method beside AGIP against what its paper says; the laws are in test_contract.py."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import budgets, counting, patterns, scores, trees
from jaxprune.transforms import MaskState
from jaxprune.transforms._acdc import phases
from tests.support import reference
from tests.support.combinations import in_turn

SHAPES = {"a": (6, 10), "b": (10, 4)}
GRADUAL = ["magnitude_transform", "saliency_transform", "random_transform"]
DYNAMIC = ["set_transform", "rigl_transform"]
ALL = [*GRADUAL, *DYNAMIC, "straight_through_transform", "acdc_transform", "agip_transform"]


def draw(seed: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    tree = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    return {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()} | {"bias": jnp.ones(4)}


def kernels(tree: Any) -> list[np.ndarray]:
    return [np.asarray(tree["a"]), np.asarray(tree["b"])]


class Trace:
    """A run on random gradients: parameters, masks and states before and after each step."""

    def __init__(self, tx: Any, steps: int, params: Any = None) -> None:
        self.params = [draw(100) if params is None else params]
        self.states = [tx.init(self.params[0])]
        self.gradients = [draw(step) for step in range(steps)]
        update = jax.jit(tx.update)
        for gradient in self.gradients:
            updates, state = update(gradient, self.states[-1], self.params[-1])
            self.params.append(optax.apply_updates(self.params[-1], updates))
            self.states.append(state)

    def masks(self, step: int) -> list[np.ndarray]:
        return kernels(jaxprune.get_masks(self.states[step]))


# ---- gradual


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADUAL)
@pytest.mark.parametrize("budget", [budgets.uniform, budgets.global_budget(0.0)])
def test_gradual_methods_drop_the_lowest_scores_among_what_is_kept(name, budget):
    prune = getattr(jaxprune, name)(0.8, every=2, stop=4, budget=budget)
    trace = Trace(jaxprune.chain(optax.sgd(0.1), prune), 6)
    ramp = {0: 0.0, 2: 0.7, 4: 0.8}
    noise = scores.random(0)([jnp.zeros(shape) for shape in SHAPES.values()])
    for step in range(6):
        before, after = trace.masks(step), trace.masks(step + 1)
        if step not in ramp:
            for old, new in zip(before, after, strict=True):
                np.testing.assert_array_equal(old, new)
            continue
        weights, slopes = kernels(trace.params[step]), kernels(trace.gradients[step])
        ranked = {
            "magnitude_transform": [np.abs(w) for w in weights],
            "saliency_transform": [np.abs(w * g) for w, g in zip(weights, slopes, strict=True)],
            "random_transform": [np.asarray(x) for x in noise],
        }[name]
        total, floors = budget(SHAPES, ramp[step])
        for new, wanted in zip(
            after, reference.largest(ranked, total, floors, before), strict=True
        ):
            np.testing.assert_array_equal(new, wanted)


def test_gradual_pruning_has_the_end_points_of_its_ramp():
    schedule = jaxprune.schedules.cubic(0.9, 3, 9, initial=0.5)
    prune = jaxprune.magnitude_transform(schedule, every=2, start=3, stop=9)
    trace = Trace(optax.chain(optax.sgd(0.1), prune), 12)
    kept = [sum(int(mask.sum()) for mask in trace.masks(step)) for step in range(13)]
    assert kept[:4] == [100] * 4
    assert kept[4] == 50 and kept[10:] == [10] * 3
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize("name", GRADUAL)
def test_gradual_methods_refuse_a_sparsity_that_falls(name):
    with pytest.raises(ValueError) as error:
        getattr(jaxprune, name)(optax.linear_schedule(0.8, 0.2, 4), every=2, stop=4)
    text = str(error.value)
    assert f"{name} regrows no weight" in text
    assert "\n  from 0.8 at step 0 to 0.5 at step 2\n  from 0.5 at step 2 to 0.2 at step 4" in text


# ---- dynamic


def moved_counts(totals: list[int], drop: float, step: int, stop: int) -> list[int]:
    fraction = reference.cosine(step, drop, 0, stop)
    return [int(np.floor(total * fraction + 0.5)) for total in totals]


@pytest.mark.slow
@pytest.mark.parametrize("chain", [jaxprune.chain, optax.chain])
def test_rigl_drops_by_magnitude_and_grows_by_gradient(chain):
    stop, drop = 6, 0.4
    prune = jaxprune.rigl_transform(0.7, every=2, stop=stop, drop=drop)
    trace = Trace(chain(optax.sgd(0.1, momentum=0.9), prune), 9)
    totals = list(budgets.erdos_renyi_kernel(SHAPES, 0.7).floors)
    assert [int(mask.sum()) for mask in trace.masks(0)] == totals
    for step in range(9):
        before, after = trace.masks(step), trace.masks(step + 1)
        if step % 2 or step > stop:
            wanted = before
        else:
            growth = trace.gradients[step]
            if chain is optax.chain:  # the incoming update is all that it sees
                momentum = trace.states[step + 1][0][0].trace
                growth = jax.tree.map(lambda m: -0.1 * m, momentum)
            wanted = reference.drop_and_grow(
                kernels(trace.params[step]),
                [np.abs(g) for g in kernels(growth)],
                before,
                totals,
                moved_counts(totals, drop, step, stop),
            )
        for new, expected in zip(after, wanted, strict=True):
            np.testing.assert_array_equal(new, expected)


@pytest.mark.slow
def test_set_grows_at_random_and_differently_at_each_mask_update_and_seed():
    def grown(seed: int) -> list[np.ndarray]:
        prune = jaxprune.set_transform(0.7, every=1, stop=50, drop=0.5, seed=seed)
        trace = Trace(jaxprune.chain(optax.sgd(0.0), prune), 2)
        return [trace.masks(step + 1)[0] & ~trace.masks(step)[0] for step in range(2)] + [
            trace.masks(0)[0]
        ]

    first, again, other = grown(0), grown(0), grown(1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[2] != other[2]).any() and (first[0] != other[0]).any()
    assert first[0].sum() > 0 and (first[0] != first[1]).any()
    # The first masks are not what the first growth is drawn from.
    noise = scores.random(0)([jnp.zeros(shape) for shape in SHAPES.values()])[0]
    drawn = np.asarray(noise)[first[0]]
    assert drawn.min() < np.sort(np.asarray(noise)[~first[2]])[-first[0].sum()]


RESTARTED = [
    (optax.sgd(0.1, momentum=0.9), ["trace"]),
    (optax.adamw(0.1), ["mu", "nu"]),
    (optax.inject_hyperparams(optax.adam)(0.1), ["mu", "nu"]),
    (optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale(-0.1)), ["trace"]),
    (optax.masked(optax.trace(0.9), {"a": True, "b": True, "bias": False}), ["trace"]),
    (optax.MultiSteps(optax.adam(0.1), 2), ["mu", "nu"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("member", "name"), in_turn(RESTARTED, DYNAMIC))
def test_chain_restarts_the_moments_of_regrown_weights(member, name):
    inner, fields = member
    prune = getattr(jaxprune, name)(0.5, every=2, stop=20, drop=0.4)
    trace = Trace(jaxprune.chain(inner, prune), 7)
    regrown = 0
    for step in range(7):
        masks, before = trace.masks(step + 1), trace.masks(step)
        regrown += sum(int((new & ~old).sum()) for new, old in zip(masks, before, strict=True))
        for field in fields:
            moment = optax.tree.get(trace.states[step + 1], field)
            for m, mask in zip(kernels(moment), masks, strict=True):
                np.testing.assert_array_equal(m[~mask], 0.0)
            if step >= 2:
                stay = [new & old for new, old in zip(masks, before, strict=True)]
                assert all((m[mask] != 0).all() for m, mask in zip(kernels(moment), stay))
    assert regrown > 10
    # The moments of leaves that are never pruned go on: here the bias's, from a gradient of 1.
    plain = optax.trace(0.9)
    state = plain.init(trace.params[0])
    if fields == ["trace"] and not isinstance(trace.states[0][0], optax.MaskedState):
        for gradient in trace.gradients:
            _, state = plain.update(gradient, state)
        got = optax.tree.get(trace.states[-1], "trace")["bias"]
        np.testing.assert_allclose(got, state.trace["bias"], rtol=1e-6)


@pytest.mark.slow
def test_adafactors_sums_over_rows_are_left_alone():
    params = {"kernel": jnp.ones((128, 128))}
    tx = jaxprune.chain(optax.adafactor(0.1), jaxprune.rigl_transform(0.5, every=1, stop=3))
    _, state = tx.update(params, tx.init(params), params)
    rows = optax.tree.get(state, "v_row")["kernel"]
    assert rows.shape == (128,) and bool((rows > 0).all())
    assert isinstance(state[-1], MaskState)


@pytest.mark.parametrize("name", ["agip_transform", "magnitude_transform"])
def test_agip_keeps_the_moments_of_pruned_weights_and_magnitude_does_not(name):
    prune = getattr(jaxprune, name)(0.5, stop=0)
    trace = Trace(jaxprune.chain(optax.sgd(0.1, momentum=0.9), prune), 2)
    moments = kernels(optax.tree.get(trace.states[-1], "trace"))
    for moment, mask in zip(moments, trace.masks(2), strict=True):
        assert ((moment[~mask] != 0) == (name == "agip_transform")).all()


# ---- straight-through


def test_straight_through_trains_dense_weights_on_the_gradients_of_the_sparse_network():
    prune = jaxprune.straight_through_transform(
        optax.constant_schedule(0.6), every=2, start=2, stop=6, budget=budgets.uniform
    )
    trace = Trace(optax.chain(optax.sgd(0.1), prune), 8)
    for i, size in enumerate([60, 40]):
        weight = kernels(trace.params[0])[i]
        for last in range(1, 9):
            keeps = [budgets.keep_count(size, 0.6) if t in (2, 4, 6) else None for t in range(last)]
            slopes = [kernels(g)[i] for g in trace.gradients[:last]]
            value, used = reference.straight_through(weight, slopes, 0.1, keeps)
            np.testing.assert_array_equal(trace.masks(last)[i], used)
            np.testing.assert_allclose(kernels(trace.params[last])[i], value, rtol=1e-5, atol=1e-6)


def test_straight_through_gives_what_is_in_use_the_optimizers_own_update():
    prune = jaxprune.straight_through_transform(0.6, every=1, stop=3)
    # Powers of two: no product is rounded, however the compiler fuses.
    sgd = optax.sgd(0.25, momentum=0.5)
    trace = Trace(optax.chain(sgd, prune), 5)
    state = sgd.init(trace.params[0])
    for step, gradient in enumerate(trace.gradients):
        updates, state = sgd.update(gradient, state)
        before, after = trace.masks(step), trace.masks(step + 1)
        plain = kernels(optax.apply_updates(trace.params[step], updates))
        got = kernels(trace.params[step + 1])
        for x, y, old, new in zip(got, plain, before, after, strict=True):
            np.testing.assert_array_equal(x[old & new], y[old & new])


# ---- AC/DC


def test_phases_are_those_of_the_paper():
    steps, sparsities = phases(0.9, every=5, start=10, stop=85)
    dense, sparse = list(range(15, 76, 10)), [*range(10, 71, 10), 85]
    assert [s for s, p in zip(steps, sparsities, strict=True) if p == 0.9] == sparse
    assert [s for s, p in zip(steps, sparsities, strict=True) if p == 0.0] == dense


@pytest.mark.parametrize(
    ("window", "steps"),
    [((5, 0, 0), [0]), ((5, 0, 4), [4]), ((2, 1, 6), [1, 3, 6]), ((2, 1, 7), [1, 3, 7])],
)
def test_the_last_phase_follows_a_dense_one(window, steps):
    found, sparsities = phases(0.5, *window)
    assert found == steps
    assert sparsities[-1] == 0.5 and all(a != b for a, b in zip(sparsities, sparsities[1:]))


@pytest.mark.parametrize(
    ("window", "dense", "steps"),
    [
        ((5, 0, 30), 2, [0, 5, 7, 12, 14, 19, 21, 26, 30]),
        ((5, 0, 12), 2, [0, 5, 12]),  # the compressed phase from 7 would end at `stop`
        ((2, 1, 20), 7, [1, 3, 10, 12, 20]),
        ((5, 10, 85), 5, phases(0.9, 5, 10, 85)[0]),
    ],
)
def test_phases_may_have_different_lengths(window, dense, steps):
    found, sparsities = phases(0.9, *window, dense)
    assert found == steps
    assert sparsities[::2] == [0.9] * len(sparsities[::2]) and not any(sparsities[1::2])
    with pytest.raises(ValueError, match="`dense` must be at least 1 step, but is 0"):
        jaxprune.acdc_transform(0.5, stop=5, dense=0)


def test_weights_come_back_from_zero_with_fresh_moments():
    prune = jaxprune.acdc_transform(0.5, every=2, start=1, stop=6)
    trace = Trace(jaxprune.chain(optax.sgd(0.1, momentum=0.9), prune), 8)
    density = [np.mean(np.concatenate([m.ravel() for m in trace.masks(s)])) for s in range(9)]
    assert density == [1, 1, 0.5, 0.5, 1, 1, 1, 0.5, 0.5]
    # Step 3 opens the dense phase: a weight that comes back moves by its own gradient alone.
    for before, after, weight, slope in zip(
        trace.masks(3),
        trace.masks(4),
        kernels(trace.params[4]),
        kernels(trace.gradients[3]),
        strict=True,
    ):
        back = after & ~before
        assert back.any()
        np.testing.assert_allclose(weight[back], -0.1 * slope[back], rtol=1e-6)


# ---- fixed masks


def test_fixed_masks_stay_and_scalars_leave_a_leaf_alone():
    params = draw(0)
    mask = jnp.arange(60).reshape(6, 10) % 3 == 0
    masks = {"a": mask, "b": jnp.array(True), "bias": jnp.array([True, False, True, True])}
    tx = optax.chain(optax.adamw(0.1), jaxprune.fixed_mask_transform(masks))
    trace = Trace(tx, 3, params)
    plain = Trace(optax.adamw(0.1), 3, params)
    np.testing.assert_array_equal(trace.params[1]["a"] != 0, mask)
    np.testing.assert_array_equal(trace.params[3]["bias"] != 0, masks["bias"])
    np.testing.assert_array_equal(trace.params[3]["b"], plain.params[3]["b"])
    got = jaxprune.get_masks(trace.states[3])
    np.testing.assert_array_equal(got["a"], mask)
    assert got["b"].shape == () and bool(got["b"])


def test_masks_that_keep_everything_cost_nothing():
    params = draw(0)
    tx = jaxprune.fixed_mask_transform(jaxprune.prune(params, 0.0)[1])
    state = jax.jit(tx.init)(params)
    assert jax.tree.leaves(state) == []
    updates, _ = tx.update(params, state, params)
    assert updates is params


def test_without_masks_everything_prunable_has_one():
    params = draw(0)
    state = jaxprune.fixed_mask_transform().init(params)
    flags = trees.prunable_flags(params)
    masks = jax.tree.leaves(state.masks)
    assert [mask.shape for mask in masks] == [leaf.shape for leaf in trees.pick(params, flags)]
    assert all(mask.all() for mask in masks)
    one = jaxprune.fixed_mask_transform(prunable=lambda path, leaf: path == "a").init(params)
    assert [mask.shape for mask in jax.tree.leaves(one)] == [params["a"].shape]
    with pytest.raises(ValueError, match="Give `masks` or `prunable`, not both"):
        jaxprune.fixed_mask_transform(params, prunable=lambda path, leaf: True)


def test_fixed_masks_are_matched_by_path_and_every_misfit_is_listed():
    masks = {"a": jnp.ones((10, 6), bool), "b": jnp.ones((10, 4)), "head": jnp.array(True)}
    with pytest.raises(ValueError) as error:
        jaxprune.fixed_mask_transform(masks).init(draw(0))
    assert str(error.value).splitlines() == [
        "`masks` must be bools with the paths and shapes of `params`:",
        "  bias: no mask",
        "  head: a mask without a leaf",
        "  a: bool[10, 6], but the parameter has shape (6, 10)",
        "  b: float32[10, 4], but the parameter has shape (10, 4)",
    ]
    with pytest.raises(ValueError, match=r"a: bool\[\], but the parameter has shape"):
        off = {"a": jnp.array(False), "b": jnp.array(True), "bias": jnp.array(True)}
        jaxprune.fixed_mask_transform(off).init(draw(0))


FLAGS = {"a": True, "b": True, "bias": False}
LABELS = {"a": "one", "b": "two", "bias": "rest"}


@pytest.mark.parametrize("wrapper", ["masked", "partition", "branches"])
def test_fixed_masks_of_the_whole_model_where_a_part_is_seen(wrapper):
    params = draw(0)
    _, masks = jaxprune.prune(params, 0.5)
    tx = jaxprune.fixed_mask_transform(masks)
    if wrapper == "masked":
        tx = optax.masked(tx, FLAGS)
    elif wrapper == "partition":
        tx = optax.partition({"one": tx, "two": tx, "rest": optax.identity()}, LABELS)
    else:  # one flag for a branch
        params = {"all": params, "head": draw(1)}
        _, masks = jaxprune.prune(params, 0.5)
        tx = optax.masked(jaxprune.fixed_mask_transform(masks), {"all": True, "head": False})
    tx = optax.chain(optax.sgd(0.1), tx)
    updates, state = tx.update(jax.tree.map(jnp.cos, params), tx.init(params), params)
    trained, held = optax.apply_updates(params, updates), jaxprune.get_masks(state)
    if wrapper == "branches":
        assert held["head"].shape == () and (trained["head"]["a"] != 0).all()
        trained, held, masks = trained["all"], held["all"], masks["all"]
    for name in ("a", "b"):
        np.testing.assert_array_equal(held[name], masks[name])
        np.testing.assert_array_equal(trained[name] != 0, masks[name])


def test_fixed_masks_without_a_leaf_that_is_only_missing_are_errors():
    params = draw(0)
    _, masks = jaxprune.prune(params, 0.5)
    tx = optax.masked(jaxprune.fixed_mask_transform(masks | {"new": jnp.array(True)}), FLAGS)
    with pytest.raises(ValueError, match=r"`params`:\n  new: a mask without a leaf$"):
        tx.init(params)
    del params["bias"]
    with pytest.raises(ValueError, match=r"`params`:\n  bias: a mask without a leaf$"):
        jaxprune.fixed_mask_transform(masks).init(params)


def test_a_tree_of_bools_for_the_whole_model_where_a_part_is_seen():
    flags = {"m": True, "h": {"k": False, "l": True}}  # one for a branch
    params = {"m": draw(0), "h": {"k": draw(1)["a"], "l": draw(2)["a"]}}
    prune = jaxprune.magnitude_transform(0.5, start=0, stop=0, prunable=flags)
    state = optax.masked(prune, {"m": True, "h": {"k": True, "l": False}}).init(params)
    masks = jaxprune.get_masks(state)
    assert masks["h"]["k"].shape == masks["h"]["l"].shape == ()
    assert {mask.ndim for mask in jax.tree.leaves(masks["m"])} == {1, 2}


# ---- all


def window(name: str) -> dict[str, Any]:
    return {"every": 2, "start": 0, "stop": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("pattern", ["2:5", "blocks", "channels"])
def test_patterns_hold_for_every_method(name, pattern):
    rule = {
        "2:5": patterns.n_m(2, 5, axis=0),
        "blocks": patterns.blocks((2, 2)),
        "channels": patterns.channels(axis=-1),
    }[pattern]
    leaf = (lambda path, leaf: path == "b") if pattern == "2:5" else None
    sparsity = 0.6 if pattern == "2:5" else 0.5
    transform = getattr(jaxprune, name)(sparsity, pattern=rule, prunable=leaf, **window(name))
    trace = Trace(jaxprune.chain(optax.sgd(0.1, momentum=0.9), transform), 6)
    a, b = trace.masks(6)
    if pattern == "2:5":
        np.testing.assert_array_equal(b.reshape(2, 5, 4).sum(1), 2)
    elif pattern == "blocks":
        blocks = [m.reshape(m.shape[0] // 2, 2, m.shape[1] // 2, 2).sum((1, 3)) for m in (a, b)]
        assert {int(n) for block in blocks for n in block.ravel()} == {0, 4}
        assert sum(int(block.sum()) for block in blocks) == 4 * budgets.keep_count(25, 0.5)
    else:
        assert all((m == m[:1]).all() for m in (a, b))
        assert sum(int(m[0].sum()) for m in (a, b)) == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["saliency_transform", "rigl_transform"])
def test_a_mask_update_waits_for_a_finite_gradient(name):
    tx = jaxprune.chain(
        optax.zero_nans(), optax.sgd(0.1), getattr(jaxprune, name)(0.5, every=2, stop=4)
    )
    params = draw(0)
    state = tx.init(params)
    before = kernels(jaxprune.get_masks(state))
    bad = draw(1) | {"a": draw(1)["a"].at[0, 0].set(jnp.nan)}
    _, state = tx.update(bad, state, params)
    assert int(state[-1].refused) == 1 and int(state[-1].mask_updates) == 0
    for mask, old in zip(kernels(jaxprune.get_masks(state)), before, strict=True):
        np.testing.assert_array_equal(mask, old)
    _, state = tx.update(draw(1), state, params)
    assert int(state[-1].refused) == 1 and int(state[-1].mask_updates) == 1


@pytest.mark.parametrize("name", ALL)
def test_bad_arguments_are_named_together(name):
    with pytest.raises(ValueError) as error:
        getattr(jaxprune, name)(0.5, every=0, start=-1, stop=-2)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{name} cannot run with these arguments:"
    assert [line.split("`")[1] for line in lines[1:]] == ["every", "start", "stop"]


@pytest.mark.parametrize("name", ALL)
def test_sparsity_must_be_a_fraction(name):
    with pytest.raises(ValueError, match=r"(?s)`sparsity`.*must lie in \[0, 1\), but is"):
        getattr(jaxprune, name)(1.0, stop=4)


@pytest.mark.parametrize("name", ALL)
def test_missing_parameters_are_named(name):
    tx = getattr(jaxprune, name)(0.5, stop=4)
    params = draw(0)
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("name", ALL)
def test_patterns_that_do_not_fit_are_listed_when_the_optimizer_is_made(name):
    tx = getattr(jaxprune, name)(0.5, stop=4, pattern=patterns.n_m(3, 7, axis=-2))
    with pytest.raises(ValueError, match=r"(?s)a: .*\n  b: "):
        tx.init(draw(0))


@pytest.mark.parametrize("drop", [-0.1, 1.0])
@pytest.mark.parametrize("name", DYNAMIC)
def test_drop_must_be_a_fraction(name, drop):
    with pytest.raises(ValueError, match=r"`drop` must lie in \[0, 1\)"):
        getattr(jaxprune, name)(0.5, stop=4, drop=drop)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agip", "rigl", "blocks", "stacked"])
def test_leaves_of_one_shape_are_pruned_as_those_of_many(name, monkeypatch):
    """Where leaves cannot be sharded, those of one shape are searched as one array."""
    window = {"every": 1, "stop": 4}
    transform = {
        "agip": jaxprune.agip_transform(0.6, regrow=0.2, **window),
        "rigl": jaxprune.rigl_transform(0.6, budget=budgets.uniform, **window),
        "blocks": jaxprune.agip_transform(0.6, pattern=patterns.blocks((2, 2)), **window),
        "stacked": jaxprune.magnitude_transform(
            0.6, stacked=lambda path, leaf: (0,) if leaf.ndim == 3 else (), **window
        ),
    }[name]
    shapes = {"a": (4, 6), "b": (2, 4, 6), "c": (4, 6), "d": (6, 4), "e": (2, 4, 6), "f": (4, 6)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    start = {n: {"kernel": jax.random.normal(k, shapes[n])} for n, k in zip(shapes, keys)}
    tx = jaxprune.chain(optax.sgd(0.1), transform)

    def masks_of_each_step():
        params, state, found = start, tx.init(start), []
        update = jax.jit(lambda g, s, p: tx.update(g, s, p))  # a new function, so traced anew
        for _ in range(4):
            updates, state = update(jax.tree.map(jnp.sin, params), state, params)
            params = optax.apply_updates(params, updates)
            found.append(jaxprune.get_masks(state))
        return found

    alone = masks_of_each_step()
    monkeypatch.setattr(counting, "_may_be_sharded", lambda: False)
    chex.assert_trees_all_equal(alone, masks_of_each_step())
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(alone[-1])) < 0.5 * 240
