"""A state that is resumed with another schedule catches up; one of other leaves is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (10, 10)),
    "c": jax.random.normal(jax.random.key(1), (10, 10)),
}


def train(transform, state, steps, params=None):
    tx = jaxprune.chain(optax.sgd(0.01), transform)
    params = PARAMS if params is None else params
    state = tx.init(params) if state is None else state
    step = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = step(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def sparsity(state):
    masks = jax.tree.leaves(jaxprune.get_masks(state))
    return 1 - sum(int(mask.sum()) for mask in masks) / 200


METHODS = {
    "magnitude": jaxprune.magnitude_transform,
    "agip": jaxprune.agip_transform,
    "random": jaxprune.random_transform,
    "straight through": jaxprune.straight_through_transform,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_later_target_is_reached(method):
    make = METHODS[method]
    params, state = train(make(0.5, every=1, stop=80), None, 100)
    assert sparsity(state) == 0.5
    for every in (1, 100):
        after = train(make(0.9, every=every, start=100, stop=100), state, 1, params)[1]
        assert sparsity(after) == pytest.approx(0.9)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_shorter_schedule_is_made_up_for(method):
    make = METHODS[method]
    params, state = train(make(0.9, every=10, stop=1000), None, 50)
    assert sparsity(state) < 0.2
    for stop in (20, 49, 50):
        after = train(make(0.9, every=10, stop=stop), state, 1, params)[1]
        assert sparsity(after) == pytest.approx(0.9)


@pytest.mark.slow
def test_a_schedule_that_starts_later_waits():
    params, state = train(jaxprune.magnitude_transform(0.5, every=1, stop=8), None, 10)
    later = jaxprune.magnitude_transform(0.9, start=15, stop=15)
    params, state = train(later, state, 5, params)
    assert sparsity(state) == 0.5
    assert sparsity(train(later, state, 1, params)[1]) == pytest.approx(0.9)


@pytest.mark.slow
@pytest.mark.parametrize("method", [jaxprune.set_transform, jaxprune.rigl_transform])
def test_the_same_schedule_goes_on_without_another_move(method):
    def make():
        return method(0.5, every=3, stop=9)

    params, state = train(make(), None, 5)
    again = train(make(), state, 1, params)[1]  # step 5: no mask update is due
    for mask, same in zip(*(jax.tree.leaves(jaxprune.get_masks(s)) for s in (state, again))):
        np.testing.assert_array_equal(mask, same)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_other_leaves_names_them(method):
    make = METHODS[method]
    _, state = train(make(0.5, stop=0, prunable=lambda path, leaf: path == "a"), None, 2)
    for prunable, lines in (
        (lambda path, leaf: path == "c", ["a: a mask in the state, but not pruned",
                                          "c: pruned, but without a mask in the state"]),
        (None, ["c: pruned, but without a mask in the state"]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="`state` must belong to a transformation") as error:
            train(make(0.5, stop=0, prunable=prunable), state, 1)
        assert [line.strip() for line in str(error.value).splitlines()[1:]] == lines


def test_a_state_of_other_shapes_names_them():
    _, state = train(jaxprune.magnitude_transform(0.5, stop=0), None, 2)
    other = {"a": jnp.ones((10, 10)), "c": jnp.ones((5, 10))}
    with pytest.raises(ValueError, match=r"c: shape \(5, 10\), but its mask in the state has"):
        train(jaxprune.magnitude_transform(0.5, stop=0), state, 1, other)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_state_whose_keys_sort_differently_is_read_by_path(method):
    """Text keys, as in a file, sort "10" before "9"; numbers do not."""
    make = METHODS[method]

    def renamed(tree, names):
        return {name: tree[old] for name, old in zip(names, ("a", "c"), strict=True)}

    params, state = train(make(0.5, every=1, stop=3), None, 5, renamed(PARAMS, (9, 10)))
    again = jax.tree.map(
        lambda node: {str(key): leaf for key, leaf in node.items()} if is_dict(node) else node,
        state,
        is_leaf=is_dict,
    )
    results = []
    for held in (state, again):
        tx = make(0.5, every=1, stop=3)
        gradients = jax.tree.map(jnp.cos, params)
        results.append(tx.update(gradients, held[-1], params)[0])
    for number in (9, 10):
        np.testing.assert_array_equal(results[0][number], results[1][number])


def is_dict(node):
    return isinstance(node, dict)
