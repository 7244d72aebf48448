"""Wanda and SparseGPT where the types of arrays say how they are split over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import layouts, post_training

METHODS = {"wanda": post_training.wanda, "sparsegpt": post_training.sparsegpt}
SPECS = {"a": P(None, "model"), "b": P("model", None), "layers": P(None, None, "model")}


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


WEIGHTS = {"a": normal(6, 16), "b": normal(16, 6), "layers": normal(2, 6, 6)}
X, TABLE = normal(8, 6), normal(8, 6)


def product(x, kernel, *out):
    spec = P("data", *out) if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types else None
    return jnp.einsum("...i,io->...o", x, kernel, out_sharding=spec)


def mlp(w, x):
    return product(jax.nn.relu(product(x, w["a"], "model")), w["b"], None)


def sequences(w, x):
    """The rows of the first product lie in two dimensions, of which one is split."""
    x = jnp.stack([x, -x], 1)
    hidden = jax.nn.relu(product(x, w["a"], None, "model"))
    return product(hidden, w["b"], None, None)


def reshaped(w, x):
    return mlp(w, jnp.tanh(x.reshape(8, 2, 3)).reshape(8, 6))


def automatic(w, x):
    if AxisType.Explicit not in jax.typeof(x).sharding.mesh.axis_types:
        return jax.nn.relu(x @ w["a"]) @ w["b"]
    call = jax.sharding.auto_axes(automatic, out_sharding=P("data", None))
    return call(w, x)


def scanned(w, x):
    return lax.scan(lambda x, layer: (jnp.tanh(product(x, layer, None)), None), x, w["layers"])[0]


FUNCTIONS = {f.__name__: f for f in (mlp, sequences, reshaped, automatic, scanned)}


@pytest.fixture
def explicit():
    axes = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axes, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "sequential"), [*((name, False) for name in FUNCTIONS), ("scanned", True)]
)
def test_a_mesh_with_explicit_axes_changes_no_mask(name, sequential, method, explicit):
    names = ["layers"] if name == "scanned" else ["a", "b"]
    prune = functools.partial(METHODS[method], sequential=sequential)
    weights = {own: WEIGHTS[own] for own in names}
    placed = {own: jax.device_put(leaf, SPECS[own]) for own, leaf in weights.items()}
    x = jax.device_put(X, P("data", None))
    with jax.set_mesh(jax.make_mesh((1,), ("alone",), (AxisType.Auto,), devices=jax.devices()[:1])):
        wanted, masks = prune(FUNCTIONS[name], weights, [X], 0.5)
    pruned, own = prune(FUNCTIONS[name], placed, [x, x], 0.5)
    for path in names:
        np.testing.assert_array_equal(own[path], masks[path])
        np.testing.assert_allclose(pruned[path], wanted[path], rtol=1e-4, atol=1e-4)
        assert pruned[path].sharding.is_equivalent_to(placed[path].sharding, pruned[path].ndim)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_stacks_in_sequence_on_a_mesh_with_automatic_axes(method):
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    prune = functools.partial(METHODS[method], scanned, sparsity=0.5, sequential=True)
    weights = {"layers": WEIGHTS["layers"]}
    wanted, masks = prune(weights, [X, X])
    place = NamedSharding(mesh, P(None, "fsdp", None))
    placed = {"layers": jax.device_put(WEIGHTS["layers"], place)}
    x = jax.device_put(X, NamedSharding(mesh, P(("data", "fsdp"), None)))
    pruned, own = prune(placed, [x, x])
    np.testing.assert_array_equal(own["layers"], masks["layers"])
    np.testing.assert_allclose(pruned["layers"], wanted["layers"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_arrays_on_a_mesh_that_is_not_entered(method):
    assert jax.sharding.get_abstract_mesh().empty
    axes = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axes, devices=jax.devices()[:4])
    specs = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}

    def apply(w, x):
        hidden = jnp.einsum(
            "bi,io->bo", x, w["a"], out_sharding=NamedSharding(mesh, P("data", "model"))
        )
        return jnp.einsum(
            "bi,io->bo", hidden, w["b"], out_sharding=NamedSharding(mesh, P("data", None))
        )

    placed = {name: jax.device_put(WEIGHTS[name], specs[name]) for name in ("a", "b")}
    x = jax.device_put(X, NamedSharding(mesh, P("data", None)))
    pruned, masks = METHODS[method](apply, placed, [x], 0.5)
    assert masks["a"].sum() == 3 * 16 and masks["b"].sum() == 8 * 6
    assert pruned["a"].sharding.is_equivalent_to(specs["a"], 2)


def test_layouts_on_a_mesh_with_explicit_axes(explicit):
    placed = {name: jax.device_put(leaf, SPECS[name]) for name, leaf in WEIGHTS.items()}
    x = jax.device_put(X, P("data", None))
    for name in ("mlp", "automatic"):
        found = layouts.find(FUNCTIONS[name], placed, x)
        assert found["a"].inputs == (0,) and found["b"].outputs == (1,), found.reason("a")
    found = layouts.find(scanned, placed, x)
    assert found["layers"].copies == (0,)
