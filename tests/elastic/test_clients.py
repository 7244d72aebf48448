"""Elastic networks in the forms that other people write: scans, names out of order, modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import elastic, structure

RANDOM = np.random.default_rng(0)


def numbers(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def check(space, variables, x):
    """Each choice, cut out, equals its masked network; one program serves all."""
    masked = jax.jit(space.masked(space.evaluate))
    (decision,) = space.decisions
    for index in range(len(decision.options)):
        small = elastic.extract(space, variables, (index,))
        found = small.plan.wrap(space.evaluate)(small.variables, x)
        expected = masked(variables, space.gates((index,)), x)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert masked._cache_size() == 1


def test_layers_that_a_scan_runs_over_with_names_out_of_order():
    def apply(variables, x):
        params = variables["params"]
        x = x @ params["z_first"]

        def layer(x, own):
            return x + jax.nn.relu(x @ own["up"]) @ own["a_down"] / 8, None

        return jax.lax.scan(layer, x, params["layers"])[0] @ params["b_last"]

    layers = {"up": numbers(3, 8, 16), "a_down": numbers(3, 16, 8)}
    params = {"z_first": numbers(4, 8), "layers": layers, "b_last": numbers(8, 3)}
    variables, x = {"params": params}, numbers(5, 4)
    groups = structure.find_groups(apply, variables, x)
    space = elastic.make_space(groups, variables, apply, widths={"params/layers/up:2": (4, 8, 16)})
    check(space, variables, x)
    small = elastic.extract(space, variables, (0,)).variables["params"]["layers"]
    assert small["up"].shape == (3, 8, 4) and small["a_down"].shape == (3, 4, 8)
    scores = elastic.consumer_norms(groups, variables)
    ordered = elastic.sort_channels(groups, variables, scores, apply=lambda own: apply(own, x))
    assert not np.array_equal(ordered["params"]["layers"]["up"], layers["up"])
    np.testing.assert_allclose(apply(ordered, x), apply(variables, x), rtol=1e-4, atol=1e-4)


def test_a_module_of_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 3, 16, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    x = numbers(5, 4)
    groups = structure.find_groups(apply, params, x)
    for name in groups:
        check(elastic.make_space(groups, params, apply, widths={name: (4, 8, 16)}), params, x)
