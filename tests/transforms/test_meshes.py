"""Every method on meshes with explicit axes, and on the shards that `jax.shard_map` shows it."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import budgets, patterns, trees
from tests.support.combinations import in_turn
from tests.transforms.test_contract import (
    STEPS,
    TRANSFORMS,
    agip,
    built,
    inputs,
    kernels,
    loss,
    make_params,
    run,
)

SPECS = {
    "both axes": {"a": {"kernel": P("x", "y"), "bias": P("y")}, "b": {"kernel": P("x", "y")}},
    "rows": {"a": {"kernel": P(("x", "y")), "bias": P()}, "b": {"kernel": P(("x", "y"))}},
    "columns": {"a": {"kernel": P(None, "y"), "bias": P("x")}, "b": {"kernel": P(None, "y")}},
}


def is_spec(node: Any) -> bool:
    return isinstance(node, P)


def make_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)


def placed(tree: Any, specs: Any, mesh: Any) -> Any:
    put = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(put, tree, specs, is_leaf=is_spec)


def types(tree: Any) -> Any:
    """Shapes, dtypes and splits, by path."""
    return {path: str(jax.typeof(leaf)) for path, leaf in trees.leaves_with_paths(tree)}


def gradients(params: Any, x: jax.Array) -> Any:
    shardings = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, params)
    return jax.sharding.auto_axes(jax.grad(loss), out_sharding=shardings)(params, x)


# ---- explicit axes

EXPLICIT = in_turn(TRANSFORMS, SPECS)


@pytest.mark.slow
@pytest.mark.parametrize(("transform", "split"), EXPLICIT)
def test_explicit_axes_give_the_masks_of_one_device(transform: str, split: str) -> None:
    mesh = make_mesh(AxisType.Explicit)
    tx, _ = built(transform)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array) -> Any:
        updates, state = tx.update(gradients(params, x), state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = placed(make_params(), SPECS[split], mesh)
        state = tx.init(params)
        before = types((params, state))
        expected = run(transform)
        for i in range(STEPS):
            params, state = step(params, state, inputs(i))
            assert types((params, state)) == before
            masks = jaxprune.get_masks(state)
            chex.assert_trees_all_equal(masks, expected.masks[i])
            jaxprune.apply_masks(params, masks)
    chex.assert_trees_all_close(params, expected.params[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["regrowth", "rigl_transform", "blocks, regrowth"])
def test_explicit_axes_exchange_no_weights(transform: str) -> None:
    mesh = make_mesh(AxisType.Explicit)
    tx, _ = built(transform)
    with jax.set_mesh(mesh):
        params = placed(make_params(), SPECS["both axes"], mesh)
        state = tx.init(params)
        text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    assert "all-reduce" in text  # of counts
    assert not re.findall(r" (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)


@pytest.mark.slow
def test_methods_with_patterns_and_pruning_in_one_call_know_explicit_axes() -> None:
    mesh = make_mesh(AxisType.Explicit)
    host = make_params()
    rules = {
        "n_m": {"pattern": patterns.n_m(2, 4, axis=0)},
        "blocks": {"pattern": patterns.blocks((2, 2))},
        "channels": {"pattern": patterns.channels(-1)},
        "uniform": {"budget": budgets.uniform},
    }
    with jax.set_mesh(mesh):
        params = placed(host, SPECS["both axes"], mesh)
        for rule, options in rules.items():
            pruned, masks = jaxprune.prune(params, 0.5, **options)
            expected, expected_masks = jaxprune.prune(host, 0.5, **options)
            chex.assert_trees_all_equal(pruned, expected)
            assert types(pruned) == types(params), rule
            # Masks from one device fit parameters that are split, and the other way round.
            again = jaxprune.apply_masks(params, expected_masks)
            chex.assert_trees_all_equal(again, expected)
            assert types(again) == types(params)
            chex.assert_trees_all_equal(jax.jit(jaxprune.apply_masks)(params, masks), expected)
            tx = jaxprune.fixed_mask_transform(expected_masks)
            state = tx.init(params)
            updates, state = jax.jit(tx.update)(params, state, params)
            chex.assert_trees_all_equal(
                jaxprune.apply_masks(optax.apply_updates(params, updates), masks),
                optax.apply_updates(params, updates),
            )
            state = jaxprune.set_masks(jaxprune.fixed_mask_transform().init(params), expected_masks)
            assert jax.typeof(state.masks["a"]["kernel"]).sharding.spec == P("x", "y")


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "member",
    [optax.lion(0.1), optax.adamw(0.1), optax.noisy_sgd(0.1, key=jax.random.key(0)),
     optax.contrib.ademamix(0.1), optax.adafactor(0.1, min_dim_size_to_factor=1)],
    ids=["lion", "adamw", "noisy_sgd", "ademamix", "adafactor"],
)  # fmt: skip
def test_the_state_keeps_its_types_on_explicit_axes(member: Any, inside: bool) -> None:
    # What optax checks of its own optimizers, one leaf with half precision among three axes.
    mesh = make_mesh(AxisType.Explicit)
    tx = jaxprune.chain(
        member, jaxprune.rigl_transform(0.5, every=1, stop=4, budget=budgets.uniform)
    )
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.ones((2, 8, 4), jnp.float16), P(None, "x", "y"))}
        state = jax.jit(tx.init)(params)
        assert types(state) == types(tx.init(params))
        update = jax.jit(tx.update) if inside else tx.update
        updates, new = update(params, state, params)
        assert (types(new), types(updates)) == (types(state), types(params))


# ---- shard_map


def spec_of(path: tuple[Any, ...], leaf: Any, specs: Any) -> P:
    """The spec of a part of the state: that of the parameter whose path ends its own."""
    del leaf
    own = [spec for name, spec in specs if trees.path_string(path).endswith(name)]
    return own[0] if own else P()


SPLIT = {"a": {"kernel": P("x", "y"), "bias": P()}, "b": {"kernel": P("x", "y")}}
SHARDED = ["default", "regrowth", "blocks, regrowth", "set_transform", "rigl_transform"]
SHARDED += ["acdc_transform", "straight_through_transform", "magnitude_transform"]


def sharded_step(tx: Any, mesh: Any, check_vma: bool) -> tuple[Any, Any]:
    """`init` and a step on shards of the kernels, with counters that all devices share."""
    flat = jax.tree_util.tree_leaves_with_path(SPLIT, is_leaf=is_spec)
    named = [(trees.path_string(path), spec) for path, spec in flat]
    state_specs = jax.tree_util.tree_map_with_path(
        functools.partial(spec_of, specs=named), jax.eval_shape(tx.init, make_params())
    )

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
    return (
        jax.jit(mapped(tx.init, in_specs=(SPLIT,), out_specs=state_specs)),
        jax.jit(mapped(step, in_specs=(SPLIT, state_specs, SPLIT), out_specs=(SPLIT, state_specs))),
    )


def shard(tree: Any, x: int, y: int) -> Any:
    def cut(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return leaf.reshape(2, -1, 4, leaf.shape[1] // 4)[x, :, y] if leaf.ndim == 2 else leaf

    return jax.tree.map(cut, tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "kind", "check_vma"),
    [(*pair, vma) for pair, vma in zip(
        in_turn(SHARDED, [AxisType.Auto, AxisType.Explicit]), [True, True, True, False] * 2
    )],
)  # fmt: skip
def test_each_shard_is_pruned_as_a_leaf(transform: str, kind: AxisType, check_vma: bool) -> None:
    tx, _ = built(transform)
    mesh = make_mesh(kind)
    init, step = sharded_step(tx, mesh, check_vma)
    params = placed(make_params(), SPLIT, mesh)
    alone = [(i, shard(params, *i)) for i in np.ndindex(2, 4)]
    state, states = init(params), [tx.init(own) for _, own in alone]
    single = jax.jit(tx.update)
    for i in range(3):
        gradients = jax.tree.map(lambda leaf, i=i: jnp.cos(leaf + i), params)
        params, state = step(params, state, gradients)
        masks = jaxprune.get_masks(state)
        for j, (at, own) in enumerate(alone):
            updates, states[j] = single(shard(gradients, *at), states[j], own)
            alone[j] = at, optax.apply_updates(own, updates)
            expected = kernels(jaxprune.get_masks(states[j]))
            for mask, wanted in zip(kernels(shard(masks, *at)), expected, strict=True):
                np.testing.assert_array_equal(mask, wanted)
    for at, own in alone:
        chex.assert_trees_all_close(shard(params, *at), own, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_shards_agree_on_counters_and_on_rates() -> None:
    tx = agip(regrow=0.3, start=0, rate=jaxprune.rates.by_density())
    init, step = sharded_step(tx, make_mesh(AxisType.Auto), True)
    params = make_params()
    gradients = jax.tree.map(jnp.cos, params)
    state = init(params)
    bad = gradients | {"b": {"kernel": gradients["b"]["kernel"].at[0, 0].set(jnp.nan)}}
    _, refused = step(params, state, bad)
    assert (int(refused.refused), int(refused.mask_updates)) == (1, 0)
    for _ in range(4):
        params, state = step(params, state, gradients)
    assert (int(state.refused), int(state.mask_updates)) == (0, 2)
    densities = [mask.mean() for mask in kernels(jaxprune.get_masks(state))]
    np.testing.assert_allclose(state.densities, densities, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["set_transform", "rigl_transform", "random", "default"])
def test_init_and_update_in_one_shard_map(name: str) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    kernel = jax.random.normal(jax.random.key(0), (8, 8))
    tx = TRANSFORMS[name]()

    def run(kernel: Any) -> Any:
        params = {"kernel": kernel}
        state = tx.init(params)
        for _ in range(5):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params["kernel"]

    both = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(kernel)
    alone = jnp.concatenate([jax.jit(run)(half) for half in jnp.split(kernel, 2)])
    np.testing.assert_array_equal(both, alone)
    assert (both == 0).any()
