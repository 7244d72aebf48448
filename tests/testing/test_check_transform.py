"""The contract holds for methods of the library, and notices a transformation that breaks a law."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.custom_partitioning import custom_partitioning

from jaxprune import budgets, testing, trees


class State(NamedTuple):
    """Masks and the number of steps."""

    masks: Any
    count: Any


def simple(
    sparsity: float,
    *,
    applies: bool = True,
    more: int = 0,
    factor: float = 1.0,
    more_steps: Any = 1,
    seed: int = 0,
    change: Any = lambda params, updates: updates,
    ranks: Any = None,
) -> optax.GradientTransformation:
    """Random masks of each kernel from the first step on, with a place for each fault."""

    def init(params: Any) -> State:
        masks = jax.tree.map(lambda x: jnp.ones(x.shape if x.ndim > 1 else (), bool), params)
        return State(masks, jnp.int32(0))

    def update(updates: Any, state: State, params: Any) -> Any:
        updates = change(params, updates)
        leaves = trees.leaf_by_path(params)
        masks = {}
        for index, (path, leaf) in enumerate(leaves.items()):
            masks[path] = jnp.bool_(True)
            if leaf.ndim > 1:
                keep = budgets.keep_count(leaf.size, sparsity) + more
                order = jax.random.permutation(jax.random.key(seed + index), leaf.size)
                order = order.reshape(leaf.shape) if ranks is None else ranks(leaf)
                masks[path] = order < keep
        masks = jax.tree.unflatten(jax.tree.structure(params), [*masks.values()])

        def masked(mask: Any, update: Any, param: Any) -> Any:
            update = factor * update
            return jnp.where(mask, update, -param.astype(update.dtype)) if applies else update

        return jax.tree.map(masked, masks, updates, params), State(masks, state.count + more_steps)

    return optax.GradientTransformation(init, update)


def fails_on(condition: Any) -> Any:
    """A change of updates that refuses some parameters."""

    def change(params: Any, updates: Any) -> Any:
        if any(map(condition, jax.tree.leaves(params))):
            raise TypeError("refused")
        return updates

    return change


def on_host(params: Any, updates: Any) -> Any:
    """Updates that went through the host, which cannot be mapped."""
    forms = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), updates)
    return jax.pure_callback(lambda x: x, forms, updates)


def calls(params: Any, updates: Any) -> Any:
    """What code does that takes anything callable for a rule."""
    if callable(params):
        params()
    return updates


def flat_masks(sparsity: float) -> optax.GradientTransformation:
    """Masks as one list, as many write them."""
    inner = simple(sparsity)

    def init(params: Any) -> State:
        state = inner.init(params)
        return state._replace(masks=tuple(jax.tree.leaves(state.masks)))

    return optax.GradientTransformation(init, inner.update)


@custom_partitioning
def local_ranks(x: jax.Array) -> jax.Array:
    """Ranks of all entries, but of sharded arrays each device ranks its own part."""
    return jnp.argsort(jnp.argsort(x.ravel())).reshape(x.shape)


local_ranks.def_partition(
    partition=lambda mesh, own, _: (mesh, local_ranks.fun, own[0].sharding, (own[0].sharding,)),
    sharding_rule="i j -> i j",
)

SEEDS = itertools.count()
BROKEN = {
    "zero": (lambda s: simple(s, applies=False), "masked weights must be exactly 0"),
    "exact": (lambda s: simple(s, more=1), r"keeps 66 of 256 .*, not 64"),
    "plain": (lambda s: simple(s, factor=1 + 1e-6), "these leaves differ"),
    "once": (lambda s: simple(s, more_steps=jnp.float32(1)), "int32"),
    "mapped": (lambda s: simple(s, change=on_host), "pure_callback"),
    "resumed": (lambda s: simple(s, seed=100 * next(SEEDS)), "these leaves differ"),
    "tools": (flat_masks, "0"),
    "half": (lambda s: simple(s, change=fails_on(lambda x: x.dtype != np.float32)), "refused"),
    "modules": (lambda s: simple(s, change=calls), "parameters were called as a function"),
    "devices": (lambda s: simple(s, ranks=local_ranks), "masks must be the same, but differ"),
}


def test_every_law_has_a_fault() -> None:
    assert [*BROKEN] == [*testing.LAWS]


@pytest.mark.parametrize("law", BROKEN)
def test_a_broken_law_is_noticed(law: str) -> None:
    make, seen = BROKEN[law]
    with pytest.raises(AssertionError, match=f"breaks 1 laws:\n  {law}: ") as error:
        testing.check_transform(make, laws=[law], steps=3)
    assert error.match(f"(?s){seen}")


def test_all_broken_laws_are_in_one_error() -> None:
    with pytest.raises(AssertionError, match=r"(?s)breaks 2 laws:\n  zero: .*\n  exact: "):
        testing.check_transform(
            lambda s: simple(s, applies=False, more=1), laws=["zero", "exact"], steps=3
        )


def test_a_simple_transformation_keeps_all_laws() -> None:
    assert jax.device_count() == 8
    results = testing.check_transform(simple, steps=3)
    assert results == dict.fromkeys(testing.LAWS, "holds")


def test_one_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    (said,) = testing.check_transform(simple, laws=["devices"]).values()
    assert said.startswith("not checked: there is one device")


def test_unknown_laws_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be of zero, exact, .*\n  speed"):
        testing.check_transform(simple, laws=["speed"])


def test_an_example_of_ones_own() -> None:
    example = testing.Example(
        params={"w": jnp.ones((4, 4))},
        loss=lambda params, x: jnp.sum((x @ params["w"]) ** 2),
        batch=lambda step: jnp.full((8, 4), step + 1.0),
    )
    make = lambda s: simple(s)  # noqa: E731
    assert testing.check_transform(make, example=example, laws=["zero", "exact"], steps=2)
