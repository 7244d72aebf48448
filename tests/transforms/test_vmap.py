"""Several networks at once: a mask update costs nothing at the steps between."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune
from tests.support.combinations import in_turn
from tests.transforms.test_contract import TRANSFORMS, agip, built, inputs, make_params

SEEDS = 3
METHODS = [name for name in TRANSFORMS if name != "fixed_mask_transform"]  # it has no mask update


def seeds() -> Any:
    return jax.tree.map(
        lambda leaf: jnp.stack([leaf * (1 + i / 10) for i in range(SEEDS)]), make_params()
    )


def loops_of_every_step(jaxpr: Any) -> int:
    """Counts the loops of a program that no branch skips; a selection of weights is a loop."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond" and equation.invars[0].aval.shape == ():
            continue
        count += equation.primitive.name in ("while", "scan")
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                count += loops_of_every_step(getattr(inner, "jaxpr", inner))
    return count


def is_program(node: Any) -> bool:
    return hasattr(node, "eqns") or hasattr(getattr(node, "jaxpr", None), "eqns")


@pytest.mark.slow
@pytest.mark.parametrize("transform", METHODS)
def test_a_mask_update_stays_behind_its_branch_under_vmap(transform: str) -> None:
    tx = TRANSFORMS[transform]()
    params = seeds()
    state = jax.eval_shape(jax.vmap(tx.init), params)
    updates = [jax.vmap(jax.jit(tx.update))]
    if transform == "default":  # two levels, as for the seeds of several settings
        updates.append(lambda *args: jax.vmap(jax.vmap(tx.update))(*args))
    for depth, update in enumerate(updates):
        deep = jax.tree.map(
            lambda x, d=depth: jnp.zeros((2,) * d + x.shape, x.dtype), (params, state)
        )
        program = jax.make_jaxpr(update)(*deep, deep[0])
        assert loops_of_every_step(program.jaxpr) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "jit"), in_turn(["default", "rigl_transform", "channels"], [True, False])
)
def test_networks_at_different_steps_get_their_own_masks(transform: str, jit: bool) -> None:
    tx, step = built(transform)
    params = seeds()
    states = [tx.init(jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(SEEDS)]
    # Each starts at a step of its own, so that an update is due for some and not for others.
    states = [(own[0], own[1]._replace(prune_step=jnp.int32(i))) for i, own in enumerate(states)]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    many = jax.vmap(step, in_axes=(0, 0, None))
    many, one = (jax.jit(many), jax.jit(step)) if jit else (many, step)
    alone = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(SEEDS)]
    for i in range(4):
        params, state = many(params, state, inputs(i))
        for j in range(SEEDS):
            alone[j], states[j] = one(alone[j], states[j], inputs(i))
            own = jax.tree.map(lambda leaf, j=j: leaf[j], (params, state))
            assert int(own[1][1].mask_updates) == int(states[j][1].mask_updates)
            chex.assert_trees_all_equal(own[1][1].masks, states[j][1].masks)
            chex.assert_trees_all_close(own[0], alone[j], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [False, True])
def test_init_in_a_compiled_function_takes_constants(groups: bool) -> None:
    params = make_params()
    tx = TRANSFORMS["channels"]() if groups else agip()
    state = jax.jit(lambda: tx.init(params))()
    chex.assert_trees_all_equal(state.masks, tx.init(params).masks)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with pytest.warns(UserWarning, match="all 0" if groups else "0 everywhere"):
        jax.jit(lambda: tx.init(zeros))()


@pytest.mark.slow
def test_an_update_can_be_differentiated() -> None:
    tx = jaxprune.chain(optax.sgd(0.1), agip(start=0, every=1))
    params = make_params()

    @functools.partial(jax.jit, static_argnums=1)
    def trained(rate: Any, steps: int) -> jax.Array:
        own, state = params, tx.init(params)
        for i in range(steps):
            gradients = jax.tree.map(lambda leaf, i=i: rate * jnp.cos(leaf + i), own)
            updates, state = tx.update(gradients, state, own)
            own = optax.apply_updates(own, updates)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(own))  # pyright: ignore

    slope = jax.grad(trained)(1.0, 2)
    near = (trained(1.01, 2) - trained(0.99, 2)) / 0.02
    assert abs(slope - near) < 0.05 * abs(near)
    chex.assert_trees_all_close(jax.vmap(jax.grad(trained), (0, None))(jnp.ones(2), 2)[0], slope)
