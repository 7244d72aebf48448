"""What `agip_transform` does beyond the laws of test_contract.py: its mechanisms and its errors."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import budgets, rates, schedules, scores

SHAPES = {"a": (6, 10), "b": (10, 4)}
SIZE = 100


def params_of(seed: int = 0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {k: jnp.asarray(random.standard_normal(s), jnp.float32) for k, s in SHAPES.items()} | {
        "bias": jnp.ones(4)
    }


def gradients_of(seed: int) -> dict[str, jax.Array]:
    return params_of(1000 + seed)


def drive(tx: Any, steps: int, params: Any = None, first: int = 0, state: Any = None) -> Any:
    """Runs an optimizer on random gradients; returns parameters and state."""
    params = params_of() if params is None else params
    state = tx.init(params) if state is None else state
    update = jax.jit(tx.update)
    for i in range(first, first + steps):
        updates, state = update(gradients_of(i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name]).ravel() for name in SHAPES])


def prune_state(state: Any) -> Any:
    return state[-1]


# Mechanism 1: when, and how many.


def test_the_ramp_ends_on_the_target_even_if_every_does_not_divide_the_window() -> None:
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.72, every=4, start=1, stop=7))
    params, state, kept = params_of(), None, []
    for i in range(9):
        params, state = drive(tx, 1, params, i, state)
        kept.append(int(flat(jaxprune.get_masks(state)).sum()))
    ramp = schedules.cubic(0.72, 1, 7)
    middle = budgets.keep_count(SIZE, ramp(5))
    assert kept == [100, 100, 100, 100, 100, middle, middle, 28, 28]
    assert int(prune_state(state).mask_updates) == 3


def test_start_equal_to_stop_is_one_shot() -> None:
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, start=2, stop=2))
    kept = []
    params, state = params_of(), None
    for i in range(4):
        params, state = drive(tx, 1, params, i, state)
        kept.append(int(flat(jaxprune.get_masks(state)).sum()))
    assert kept == [100, 100, 50, 50]


def test_sparsity_may_be_any_schedule_even_a_falling_one() -> None:
    schedule = optax.piecewise_constant_schedule(0.8, {2: 0.5, 4: 0.5})  # .8, .4 from 2, .2
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(schedule, every=1, start=0, stop=6))
    params, state, kept = params_of(), None, []
    for i in range(7):
        params, state = drive(tx, 1, params, i, state)
        kept.append(int(flat(jaxprune.get_masks(state)).sum()))
    expected = [budgets.keep_count(SIZE, float(schedule(step))) for step in range(7)]
    assert kept == expected and kept[0] < kept[-1]


# Mechanism 2: statistics and scores.


def reference_averages(decay: float, steps: int) -> np.ndarray:
    average = np.zeros(SIZE)
    for i in range(steps):
        average = decay * average + (1 - decay) * np.abs(flat(gradients_of(i)))
    return average / (1 - decay**steps)


@pytest.mark.parametrize("score", [scores.taylor, scores.gradient, scores.magnitude])
def test_the_lowest_scores_go(score: Any) -> None:
    tx = jaxprune.chain(
        optax.sgd(0.1),
        jaxprune.agip_transform(
            0.6, start=4, stop=4, decay=0.9, score=score, budget=budgets.global_budget(0.0)
        ),
    )
    before, state = drive(tx, 4)
    _, state = drive(tx, 1, before, 4, state)
    weights, average = np.abs(flat(before)), reference_averages(0.9, 5)
    wanted = {"taylor": weights * average, "gradient": average, "magnitude": weights}
    order = np.argsort(-wanted[score.__name__], kind="stable")
    expected = np.zeros(SIZE, bool)
    expected[order[:40]] = True
    np.testing.assert_array_equal(flat(jaxprune.get_masks(state)), expected)
    np.testing.assert_allclose(
        flat(prune_state(state).gradient_average) / (1 - 0.9**5), average, rtol=1e-5
    )


def test_chain_averages_the_gradient_and_a_plain_chain_the_update() -> None:
    pruner = jaxprune.agip_transform(0.5, start=9, stop=9, decay=0.5)
    for chain, factor in ((jaxprune.chain, 1.0), (optax.chain, 0.01)):
        _, state = drive(chain(optax.sgd(0.01), pruner), 1)
        np.testing.assert_allclose(
            flat(prune_state(state).gradient_average),
            0.5 * factor * np.abs(flat(gradients_of(0))),
            rtol=1e-5,
        )


@pytest.mark.parametrize("chain", [jaxprune.chain, optax.chain])
def test_without_an_average_the_momentum_is_the_statistic(chain: Any) -> None:
    tx = chain(
        optax.sgd(0.1, momentum=0.9),
        jaxprune.agip_transform(
            0.6, start=3, stop=3, decay=None, budget=budgets.global_budget(0.0)
        ),
    )
    before, state = drive(tx, 3)
    _, state = drive(tx, 1, before, 3, state)
    assert prune_state(state).gradient_average == ()
    momentum = flat(state[0][0].trace)
    expected = np.zeros(SIZE, bool)
    expected[np.argsort(-np.abs(flat(before) * momentum), kind="stable")[:40]] = True
    np.testing.assert_array_equal(flat(jaxprune.get_masks(state)), expected)


# Mechanism 3: redistribution.


def test_no_leaf_dies_and_the_floor_holds() -> None:
    params = params_of() | {"b": 1e-6 * params_of()["b"]}
    for floor, expected in ((0.0, 0), (0.5, 5)):
        tx = jaxprune.chain(
            optax.sgd(0.0),
            jaxprune.agip_transform(
                0.75, start=0, stop=0, budget=budgets.global_budget(floor), score=scores.magnitude
            ),
        )
        _, state = drive(tx, 1, params)
        kept = int(jaxprune.get_masks(state)["b"].sum())
        assert kept == max(expected, 1)


def test_regrown_weights_start_at_zero_where_the_statistic_is_largest() -> None:
    tx = jaxprune.chain(
        optax.sgd(0.1),
        jaxprune.agip_transform(0.5, every=2, start=0, stop=12, regrow=0.4, decay=0.0),
    )
    regrown_in_all, state = 0, None
    params = params_of()
    for i in range(13):
        before = params
        old = np.ones(SIZE, bool) if state is None else flat(jaxprune.get_masks(state))
        params, state = drive(tx, 1, before, i, state)
        new = flat(jaxprune.get_masks(state))
        regrown = new & ~old
        regrown_in_all += regrown.sum()
        np.testing.assert_array_equal(flat(before)[regrown], 0.0)
        # Their first step is that of the optimizer.
        np.testing.assert_allclose(
            flat(params)[regrown], -0.1 * flat(gradients_of(i))[regrown], rtol=1e-6
        )
        if regrown.any():
            size = np.abs(flat(gradients_of(i)))
            assert size[regrown].min() >= size[~old & ~new].max()
    assert regrown_in_all > 10
    assert new.sum() == 50


@pytest.mark.slow
def test_what_a_mask_update_drops_it_does_not_regrow() -> None:
    tx = jaxprune.agip_transform(
        lambda step: 0.5, every=1, start=0, stop=4, regrow=0.5, score=scores.magnitude, decay=0.0
    )
    params = {"kernel": jnp.arange(1.0, 21.0).reshape(4, 5)}
    # Loudest where the second update drops, then where the first one did.
    loudness = jnp.ones(20).at[10:14].set(9.0).at[:4].set(5.0)
    gradients = {"kernel": loudness.reshape(4, 5)}
    state = tx.init(params)
    _, state = tx.update(gradients, state, params)
    first = np.asarray(state.masks["kernel"]).ravel()
    _, state = tx.update(gradients, state, params)
    second = np.asarray(state.masks["kernel"]).ravel()
    np.testing.assert_array_equal(np.flatnonzero(first), range(10, 20))
    moved = 10 - (first & second).sum()
    assert moved == 4  # 10 * 0.5 / 2 * (1 + cos(pi / 4)) = 4.3
    np.testing.assert_array_equal(np.flatnonzero(second), [0, 1, 2, 3, *range(14, 20)])


@pytest.mark.slow
@pytest.mark.parametrize("budget", [budgets.uniform, budgets.global_budget(0.5)])
def test_regrowth_moves_weights_between_layers_unless_the_budget_fixes_them(budget: Any) -> None:
    tx = jaxprune.chain(
        optax.sgd(0.0),
        jaxprune.agip_transform(
            lambda step: 0.5, every=1, start=0, stop=4, decay=0.0, regrow=0.5, budget=budget
        ),
    )
    params = params_of()
    state = tx.init(params)
    per_leaf = []
    for a, b in ((1.0, 1e-3), (1e-3, 1.0), (1e-3, 1.0)):
        gradient = {"a": a * jnp.ones((6, 10)), "b": b * jnp.ones((10, 4)), "bias": jnp.ones(4)}
        _, state = tx.update(gradient, state, params)
        per_leaf.append([int(m.sum()) for m in (state[-1].masks["a"], state[-1].masks["b"])])
    assert [sum(counts) for counts in per_leaf] == [50] * 3
    if budget is budgets.uniform:
        assert per_leaf == [[30, 20]] * 3
    else:
        assert per_leaf[1][1] > per_leaf[0][1] + 5 and per_leaf[1][0] >= 15


# Mechanism 4: the rate of the survivors.


@pytest.mark.slow
def test_rate_by_density_scales_the_update_of_each_leaf() -> None:
    plain, scaled = (
        jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.75, start=0, stop=0, rate=rate))
        for rate in (None, rates.by_density(power=1.0, limit=3.0))
    )
    params = params_of()
    updates = []
    for tx in (plain, scaled):
        _, state = tx.update(gradients_of(0), tx.init(params), params)
        update, state = tx.update(gradients_of(1), state, params)
        updates.append(update)
    for name, size in (("a", 60), ("b", 40)):
        mask = np.asarray(state[-1].masks[name])
        factor = min(3.0, size / mask.sum())
        np.testing.assert_allclose(
            np.asarray(updates[1][name])[mask], factor * np.asarray(updates[0][name])[mask], 1e-5
        )
        assert factor > 1
    chex.assert_trees_all_equal(updates[0]["bias"], updates[1]["bias"])


@pytest.mark.slow
def test_rate_by_statistic_favours_large_gradients() -> None:
    tx = jaxprune.chain(
        optax.sgd(0.1),
        jaxprune.agip_transform(0.5, start=0, stop=0, decay=0.0, rate=rates.by_statistic()),
    )
    params = params_of()
    updates, state = tx.update(gradients_of(0), tx.init(params), params)
    for i, name in enumerate(SHAPES):
        mask, g = np.asarray(state[-1].masks[name]), np.asarray(gradients_of(0)[name])
        mean, density = np.abs(g[mask]).mean(), mask.mean()
        factor = np.clip(1 + (1 - density) * (np.abs(g) / mean - 1), 0.5, 2.0)
        np.testing.assert_allclose(np.asarray(updates[name])[mask], (-0.1 * factor * g)[mask], 1e-4)
        np.testing.assert_allclose(state[-1].densities[i], density, rtol=1e-6)


# Faults.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decay", "chain"),
    [(0.9, jaxprune.chain), (0.9, optax.chain), (None, optax.chain)],  # a momentum stays NaN
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_no_mask_and_no_average(
    decay: float | None, chain: Any, bad: float
) -> None:
    tx = chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, start=2, stop=2, decay=decay))
    params, state = drive(tx, 2)
    gradients = jax.tree.map(lambda g: jnp.full_like(g, bad), gradients_of(2))
    _, after = jax.jit(tx.update)(gradients, state, params)
    old, new = prune_state(state), prune_state(after)
    chex.assert_trees_all_equal(new.masks, old.masks)
    chex.assert_trees_all_equal(new.gradient_average, old.gradient_average)
    assert int(new.refused) == 1 and int(new.mask_updates) == 0
    # The mask update is made up for at the next step, from the parameters that were kept.
    _, state = drive(tx, 1, params, 3, after)
    assert int(flat(jaxprune.get_masks(state)).sum()) == 50
    assert int(prune_state(state).refused) == 1 and int(prune_state(state).mask_updates) == 1


@pytest.mark.slow
def test_one_nan_leaves_the_average_of_its_weight_only() -> None:
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, start=5, stop=5))
    params, state = drive(tx, 2)
    gradients = gradients_of(2)
    gradients["a"] = gradients["a"].at[0, 3].set(jnp.nan)
    _, after = tx.update(gradients, state, params)
    same = flat(prune_state(after).gradient_average) == flat(prune_state(state).gradient_average)
    assert same[3] and same.sum() == 1


def test_parameters_that_are_not_finite_are_not_pruned() -> None:
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, start=0, stop=0))
    params = params_of()
    params["b"] = params["b"].at[0, 0].set(jnp.inf)
    _, state = tx.update(gradients_of(0), tx.init(params), params)
    assert flat(jaxprune.get_masks(state)).all()
    assert int(prune_state(state).refused) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"`sparsity`.*\[0, 1\).*\n  1.0 at step 10"),
        ({"sparsity": -0.1}, r"`sparsity`"),
        ({"sparsity": float("nan")}, r"`sparsity`.*\n.*nan"),
        ({"sparsity": lambda step: 2.0}, r"`sparsity`.*\n.*2.0 at step"),
        ({"every": 0}, "`every` must be at least 1 step, but is 0"),
        ({"start": -1}, "`start` must not be negative, but is -1"),
        ({"start": 11}, "`stop` must not be before `start`, but 10 < 11"),
        ({"decay": 1.0}, "`decay` must lie in"),
        ({"dtype": jnp.int32}, "`dtype` must be a floating-point type"),
        ({"dtype": jnp.bfloat16, "decay": 0.999}, "bfloat16 allows a `decay` up to 0.99"),
        ({"regrow": 1.0}, "`regrow` must lie in"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxprune.agip_transform(**({"sparsity": 0.5, "stop": 10} | arguments))


def test_bad_arguments_are_named_together() -> None:
    with pytest.raises(ValueError, match="`every`(.|\n)*`regrow`"):
        jaxprune.agip_transform(0.5, stop=10, every=0, regrow=2.0)


def test_bad_trees_are_named() -> None:
    tx = jaxprune.agip_transform(0.5, stop=10)
    params = params_of()
    state = tx.init(params)
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"`updates`(.|\n)*a: missing"):
        tx.update({k: v for k, v in params.items() if k != "a"}, state, params)
    with pytest.raises(ValueError, match="`prunable` matches no leaf"):
        tx.init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"`prunable` must select floating-point(.|\n)*a: .*int32"):
        jaxprune.agip_transform(0.5, stop=10, prunable=lambda path, leaf: True).init(
            {"a": jnp.ones((2, 2), jnp.int32)}
        )
    with pytest.raises(ValueError, match="fewer than the 2 that the floors"):
        jaxprune.agip_transform(0.99, stop=10).init({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))})


def test_prunable_takes_a_predicate_or_a_tree() -> None:
    only_b = [
        lambda path, leaf: path == "b",
        {"a": False, "b": True, "bias": False},
    ]
    for prunable in only_b:
        tx = jaxprune.chain(
            optax.sgd(0.1), jaxprune.agip_transform(0.5, start=0, stop=0, prunable=prunable)
        )
        _, state = drive(tx, 1)
        masks = jaxprune.get_masks(state)
        assert masks["a"].all() and masks["bias"].all() and int(masks["b"].sum()) == 20


def test_the_wrong_state_is_named() -> None:
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, stop=10))
    with pytest.raises(ValueError, match="`state` must have one entry for each of the 2"):
        tx.update(params_of(), (optax.EmptyState(),), params_of())


# Cost.


def test_no_pass_over_memory_is_added_by_the_branch() -> None:
    """Nothing as large as a parameter is computed for the branch alone: only buffers enter it."""
    tx = jaxprune.chain(
        optax.sgd(0.1, momentum=0.9), jaxprune.agip_transform(0.5, stop=10, decay=None)
    )
    params = params_of()
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    outputs = {id(v): e for e in jaxpr.jaxpr.eqns for v in e.outvars}
    conds = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conds) == 1
    large = [v for v in conds[0].invars if getattr(v.aval, "size", 0) >= 40]
    # Momentum is stored anyway; parameters and masks are inputs.
    computed = [outputs[id(v)] for v in large if id(v) in outputs]
    assert all(id(v) in {id(o) for o in jaxpr.jaxpr.outvars} for e in computed for v in e.outvars)
    assert len(large) == 6


def test_rates_of_a_tree_that_int32_cannot_count():
    params = {"table": jax.ShapeDtypeStruct((3, 2**30), jnp.float32)}
    tx = jaxprune.agip_transform(0.5, stop=2, rate=rates.by_density(), budget=budgets.uniform)
    state = jax.eval_shape(tx.init, params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [
        leaf.dtype for leaf in jax.tree.leaves(state)
    ]


# ---- layers that have never moved


def train_unmoved(params, loss, transform, steps=4):
    tx = jaxprune.chain(optax.sgd(0.1, momentum=0.9), transform)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return {path: int(mask.sum()) for path, mask in jaxprune.get_masks(state).items()}


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.9, None])
def test_a_leaf_without_gradient_keeps_its_share_by_magnitude(decay):
    """A fixed table of positions: `|w| S` is 0 everywhere, which does not mean worthless."""
    random = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(random.normal(size=(10, 10)), jnp.float32),
        "used": jnp.asarray(random.normal(size=(30, 10)), jnp.float32),
    }

    def loss(p):
        table = jax.lax.stop_gradient(p["table"])
        return jnp.mean((p["used"] + table.sum()) ** 2)

    transform = jaxprune.agip_transform(0.8, every=1, stop=3, decay=decay)
    kept = train_unmoved(params, loss, transform)
    assert kept == {"table": 20, "used": 60}
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.8, stop=0))
    state = tx.init(params)
    _, state = tx.update(jax.grad(loss)(params), state, params)
    mask, sizes = np.asarray(jaxprune.get_masks(state)["table"]), np.abs(params["table"])
    assert sizes[mask].min() > sizes[~mask].max()


@pytest.mark.slow
@pytest.mark.parametrize("method", [jaxprune.agip_transform, jaxprune.saliency_transform])
def test_a_leaf_that_starts_at_0_keeps_its_share_and_is_named(method):
    """The second factor of LoRA: its gradients are large, its weights still 0."""
    random = np.random.default_rng(1)
    params = {
        "lora_a": jnp.asarray(random.normal(size=(10, 20)), jnp.float32),
        "lora_b": jnp.zeros((20, 10)),
    }
    x = jnp.asarray(random.normal(size=(6, 10)), jnp.float32)

    def loss(p):
        return jnp.mean((x @ p["lora_a"] @ p["lora_b"] - 1) ** 2)

    with pytest.warns(UserWarning, match="0 everywhere: lora_b. Weights are ranked by"):
        kept = train_unmoved(params, loss, method(0.5, stop=0), steps=1)
    # No gradient reaches `lora_a` behind it: neither has moved, so both keep half.
    assert kept == {"lora_a": 100, "lora_b": 100}
    with pytest.warns(UserWarning):
        state = jaxprune.saliency_transform(0.5, stop=0).init(params)
    gradients = jax.grad(loss)(params)
    _, state = jaxprune.saliency_transform(0.5, stop=0).update(gradients, state, params)
    mask, sizes = np.asarray(state.masks["lora_b"]), np.abs(gradients["lora_b"])
    assert sizes[mask].min() >= sizes[~mask].max()


@pytest.mark.slow
def test_an_expert_that_was_never_chosen_keeps_its_share():
    params = {"experts": jnp.asarray(np.random.default_rng(2).normal(size=(4, 8, 8)), jnp.float32)}

    def loss(p):
        return jnp.mean(p["experts"][:3] ** 2)  # the fourth is idle

    tx = jaxprune.agip_transform(0.75, stop=0, stacked=lambda path, leaf: 0)
    _, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
    kept = np.asarray(state.masks["experts"]).sum((1, 2))
    assert kept.sum() == 64 and kept[3] == 16


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-18, 1e-30])
def test_tiny_gradients_rank_like_large_ones(scale):
    params = {"kernel": jnp.asarray(np.random.default_rng(3).normal(size=(8, 8)), jnp.float32)}
    gradients = {"kernel": jnp.asarray(np.random.default_rng(4).normal(size=(8, 8)), jnp.float32)}

    def masks(params, gradients):
        tx = jaxprune.agip_transform(0.5, stop=0)
        return tx.update(gradients, tx.init(params), params)[1].masks["kernel"]

    wanted = masks(params, gradients)
    # Powers of two, so that nothing is rounded.
    factor = 2.0 ** round(np.log2(scale))
    small = jax.tree.map(lambda g: g * factor, gradients)
    np.testing.assert_array_equal(masks(params, small), wanted)
    light = jax.tree.map(lambda w: w * 2.0**-30, params)
    np.testing.assert_array_equal(masks(light, small), wanted)
