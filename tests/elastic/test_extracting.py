"""A sub-network that is cut out computes what the masked network computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import elastic, trees
from tests.support import elastic as support


@pytest.fixture(scope="module")
def space():
    return support.make_space()


@pytest.fixture(scope="module")
def variables(space):
    """Trained ones have matrices that are no identities."""
    rng = np.random.default_rng(5)
    transforms = jax.tree.map(
        lambda x: x + 0.1 * jnp.asarray(rng.normal(size=x.shape), jnp.float32),
        space.variables["transforms"],
    )
    return {**space.variables, "transforms": transforms}


X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 6, 1)), jnp.float32)


@pytest.mark.slow
def test_two_hundred_choices_equal_their_masked_networks(space, variables):
    """In evaluation and in training mode, as a plain function of smaller arrays."""
    masked = jax.jit(space.masked(space.evaluate)), jax.jit(space.masked(space.train))
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(250):  # some differ only in blocks that are skipped
        choice = elastic.draw(space.decisions, rng)
        gates = space.gates(choice)
        small = elastic.extract(space, variables, choice)
        own = {name: small.crop()[name] for name in ("params", "state")}
        found = support.evaluate(own, X)
        np.testing.assert_allclose(found, masked[0](variables, gates, X), rtol=1e-5, atol=1e-5)
        (found, new), (expected, updates) = support.train(own, X), masked[1](variables, gates, X)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        updates = trees.leaf_by_path(updates)
        for path, leaf in trees.leaf_by_path(new).items():
            wide = small.plan.take(path, updates[path])
            np.testing.assert_allclose(leaf, wide, rtol=1e-5, atol=1e-5)
        seen.add(small.choice)
    assert len(seen) > 80
    assert masked[0]._cache_size() == masked[1]._cache_size() == 1


def test_extracted_arrays_have_the_chosen_shapes(space, variables):
    choices = {own.name: 0 for own in space.decisions} | {"body": 1}
    choice = tuple(choices[own.name] for own in space.decisions)
    small = elastic.extract(space, variables, choice)
    own = small.crop()["params"]
    assert own["block1"]["up"]["kernel"] is None
    assert own["block0"]["up"]["kernel"].shape == (1, 1, 2, 1)
    assert own["block0"]["deep"]["kernel"].shape == (3, 3, 1, 1)
    assert own["head"].shape == (2, 3)
    assert small.description["body"] == 1
    assert not any("block1" in name for name in small.description)


def test_a_small_kernel_is_the_centre_of_the_large_one_at_first(space):
    choice = tuple(0 if own.kind == "kernel" else len(own.options) - 1 for own in space.decisions)
    small = elastic.extract(space, space.variables, choice).crop()
    large = space.variables["params"]["block0"]["deep"]["kernel"]
    np.testing.assert_array_equal(small["params"]["block0"]["deep"]["kernel"], large[1:4, 1:4])


def test_the_three_of_a_seven_is_the_centre():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(7, 7, 2, 3)), jnp.float32)
    from jaxprune.elastic import _kernels

    three, five, seven = _kernels.shrunk(kernel, _kernels.identities((3, 5, 7)), (3, 5, 7))
    np.testing.assert_array_equal(three, kernel[2:5, 2:5])
    np.testing.assert_array_equal(five, kernel[1:6, 1:6])
    assert seven is kernel


def test_the_three_of_a_seven_goes_through_both_matrices():
    from jaxprune.elastic import _kernels

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(7, 7, 2, 3)).astype(np.float32)
    matrices = {"5": rng.normal(size=(25, 25)), "3": rng.normal(size=(9, 9))}
    five = (matrices["5"] @ kernel[1:6, 1:6].reshape(25, 6)).reshape(5, 5, 2, 3)
    three = (matrices["3"] @ five[1:4, 1:4].reshape(9, 6)).reshape(3, 3, 2, 3)
    matrices = {size: jnp.asarray(own, jnp.float32) for size, own in matrices.items()}
    found = _kernels.shrunk(jnp.asarray(kernel), matrices, (3, 5, 7))
    np.testing.assert_allclose(found[1], five, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[0], three, rtol=1e-4, atol=1e-4)


def test_matrices_get_gradients_only_where_their_window_is_chosen(space, variables):
    def loss(variables, gates):
        return jnp.sum(space.masked(space.evaluate)(variables, gates, X) ** 2)

    for index in (0, 1):
        choice = tuple(
            index if own.kind == "kernel" else len(own.options) - 1 for own in space.decisions
        )
        grads = jax.jit(jax.grad(loss))(variables, space.gates(choice))["transforms"]
        moved = [bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads)]
        assert moved == [index == 0] * 2


def test_what_is_removed_gets_no_gradient(space, variables):
    def loss(variables, gates):
        return jnp.sum(space.masked(space.train)(variables, gates, X)[0] ** 2)

    gates = space.gates(elastic.smallest(space.decisions))
    grads = jax.jit(jax.grad(loss))(variables, gates)["params"]
    assert not any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(grads["block0"]))
    assert (grads["head"][2:] == 0).all()
    assert (grads["head"][:2] != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mbconv"])
def test_named_networks_become_plain_modules(name):
    space = elastic.named(name, image_size=8, streams=(0.5, 1.0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + (x.ndim == 1), jnp.float32),
        space.variables,
    )
    variables["model_state"] = jax.tree.map(lambda x: jnp.abs(x) + 0.5, variables["model_state"])
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 1)), jnp.float32)
    masked = jax.jit(space.masked(space.evaluate))
    ends = elastic.smallest(space.decisions), elastic.largest(space.decisions)
    for choice in (*ends, *(elastic.draw(space.decisions, rng) for _ in range(4))):
        small = elastic.extract(space, variables, choice)
        found = elastic.to_module(space, small)(x)
        expected = masked(variables, space.gates(choice), x)
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


def test_only_networks_of_models_become_modules(space, variables):
    small = elastic.extract(space, variables, elastic.smallest(space.decisions))
    with pytest.raises(ValueError, match="`elastic.named`"):
        elastic.to_module(space, small)


def test_a_choice_outside_of_the_space_is_an_error(space, variables):
    with pytest.raises(ValueError, match="`choice` must lie in the space"):
        elastic.extract(space, variables, (9,) * len(space.decisions))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "resnet21"}, "`name` must be mbconv or one of resnet8"),
        ({"name": "resnet8", "widths": (0.5,)}, "`widths` must be fractions"),
        ({"name": "resnet8", "streams": (0, 1.0)}, "`streams` must be fractions"),
    ],
)
def test_named_networks_check_their_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        elastic.named(**arguments)
