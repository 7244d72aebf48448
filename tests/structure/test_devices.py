"""Functions on several devices: named axes, `shard_map`, meshes with explicit axes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxprune import structure
from jaxprune.structure import Trace
from tests.support.checks import check, draw, halves

DEVICES = 4
RING = [(device, (device + 1) % DEVICES) for device in range(DEVICES)]
ONES = jnp.ones((1, 16))
XS = 0.3 * draw(DEVICES, 5, 3)  # a batch for each device
WEIGHTS = {"a": draw(3, 16), "bias": draw(16), "b": draw(16, 2)}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((DEVICES,), ("i",), (AxisType.Auto,), devices=jax.devices()[:DEVICES])


# ---- named axes: an operation on the hidden layer [batch, width] of each device

COLLECTIVES = {
    "pmean": lambda h: h - lax.pmean(h, "i"),
    "psum": lambda h: h - lax.psum(h.mean(0, keepdims=True), "i"),
    "psum of two": lambda h: h - sum(lax.psum((h, h * h), "i")) / 9,
    "psum of ones": lambda h: (
        h * lax.psum(jnp.ones_like(h), "i") + lax.psum(jnp.ones((1, 16)), "i")
    ),
    "pmax": lambda h: h - lax.pmax(lax.stop_gradient(h), "i"),
    "ppermute": lambda h: h + lax.ppermute(h, "i", RING),
    "all_gather": lambda h: h - lax.all_gather(h, "i").mean(0),
    "all_gather of rows": lambda h: h - lax.all_gather(h, "i", tiled=True).mean(0, keepdims=True),
    "psum_scatter": lambda h: h + lax.psum_scatter(jnp.stack([h, h * h] * 2), "i"),
    "psum_scatter of rows": lambda h: (
        h + lax.psum_scatter(jnp.concatenate([h, h * h] * 2), "i", tiled=True)
    ),
    "all_to_all": lambda h: h + lax.all_to_all(jnp.stack([h, h * h] * 2), "i", 0, 0).sum(0),
    "index and size": lambda h: h * (lax.axis_index("i") + 1) / lax.axis_size("i"),
}


def one_device(operation):
    def net(w, x):
        hidden = operation(x @ w["a"] + w["bias"][None])
        return jax.nn.relu(hidden) @ w["b"]

    return net


def everywhere(operation, mesh):
    """The net by each way to give an axis its name."""
    net = one_device(operation)

    def part(w, x):
        return net(w, x[0])[None]

    mapped = functools.partial(jax.shard_map, part, mesh=mesh, out_specs=P("i"))
    return {
        "vmap": jax.vmap(net, (None, 0), axis_name="i"),
        "pmap": jax.pmap(net, "i", in_axes=(None, 0), devices=jax.devices()[:DEVICES]),
        "shard_map": mapped(in_specs=(P(), P("i"))),
        "shard_map unchecked": mapped(in_specs=(P(), P("i")), check_vma=False),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_over_a_named_axis(name, mesh):
    for way, function in everywhere(COLLECTIVES[name], mesh).items():
        groups, _ = check([Trace(function, (XS,))], WEIGHTS)
        assert {n: g.size for n, g in groups.items()} == {"a:1": 16}, way


def test_a_wrapped_function_inside_of_a_map(mesh):
    net = one_device(COLLECTIVES["pmean"])
    every = jax.vmap(net, (None, 0), axis_name="i")
    groups = structure.find_groups(every, WEIGHTS, XS)
    plan = groups.plan(halves(groups), multiple=1)
    small, wanted = plan.compact(WEIGHTS), every(plan.mask(WEIGHTS), XS)
    for way, function in everywhere_wrapped(plan, net, mesh).items():
        np.testing.assert_allclose(function(small, XS), wanted, atol=1e-5, err_msg=way)


def everywhere_wrapped(plan, net, mesh):
    part = plan.wrap(lambda w, x: net(w, x[0])[None])
    return {
        "vmap": jax.vmap(plan.wrap(net), (None, 0), axis_name="i"),
        "shard_map": jax.shard_map(part, mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i")),
    }


@pytest.mark.slow
def test_norms_with_an_axis_name():
    class Normed(linen.Module):
        """A batch norm over the batches of all devices."""

        @linen.compact
        def __call__(self, x, train):
            hidden = linen.Dense(16)(x)
            norm = linen.BatchNorm(use_running_average=not train, axis_name="i")
            return linen.Dense(2)(linen.relu(norm(hidden)))

    model = Normed()
    variables = model.init(jax.random.key(0), XS[0], False)

    def train(variables, xs):
        def one(x):
            return model.apply(variables, x, True, mutable=["batch_stats"])

        return jax.vmap(one, axis_name="i", out_axes=(0, None))(xs)

    groups, _ = check([Trace(train, (XS,), lambda output: output[1])], variables)
    assert {name: group.size for name, group in groups.items()} == {"params/Dense_0/kernel:1": 16}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_norms_of_equinox_in_training(mode):
    eqx = pytest.importorskip("equinox")

    class Normed(eqx.Module):
        """A batch norm over the axis that `vmap` names."""

        first: Any
        norm: Any
        last: Any

        def __call__(self, x, state):
            hidden, state = self.norm(self.first(x), state)
            return self.last(jax.nn.relu(hidden)), state

    def make():
        keys = jax.random.split(jax.random.key(0))
        first, last = eqx.nn.Linear(3, 16, key=keys[0]), eqx.nn.Linear(16, 2, key=keys[1])
        return Normed(first, eqx.nn.BatchNorm(16, "batch", mode=mode), last)

    model, state = eqx.nn.make_with_state(make)()

    def train(variables, x):
        call = jax.vmap(variables["model"], (0, None), (0, None), axis_name="batch")
        output, state = call(x, variables["state"])
        return output, {"state": state}

    def updates(output):
        return output[1]

    variables = {"model": model, "state": state}
    groups = structure.find_groups(train, variables, XS[0], updates=updates)
    assert {name: group.size for name, group in groups.items()} == {"model/first/weight:0": 16}
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(train, variables, XS[0], updates=updates) < 1e-5


# ---- weights that are split over devices: each loses the same channels of its part


@jax.custom_vjp
def copied(x):
    return x


copied.defvjp(lambda x: (x, None), lambda _, g: (lax.psum(g, "i"),))


@pytest.mark.parametrize("checked", [True, False])
def test_a_width_that_is_split_over_devices(mesh, checked):
    def part(w, x):
        hidden = jax.nn.relu((x if checked else copied(x)) @ w["a"] + w["bias"][None])
        return lax.psum(hidden @ w["b"], "i")

    specs = {"a": P(None, "i"), "bias": P("i"), "b": P("i", None)}
    net = jax.shard_map(part, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=checked)
    groups = structure.find_groups(net, WEIGHTS, XS[0])
    (group,) = groups.values()
    assert group.size == 16 // DEVICES
    assert group.members[0].channels.tolist() == list(range(4)) * DEVICES
    plan = groups.plan({group.name: np.arange(4) < 3}, multiple=1)
    assert plan.verify(net, WEIGHTS, XS[0]) < 1e-5

    def slopes(function):
        return lambda w, x: jax.grad(lambda w: jnp.sum(jnp.sin(function(w, x))))(w)

    assert plan.verify(slopes(net), WEIGHTS, XS[0], updates=lambda output: output) < 1e-5
    assert structure.count_macs(net, WEIGHTS, XS[0]) == 5 * 16 * (3 + 2)


@pytest.mark.slow
def test_a_width_that_devices_exchange(mesh):
    def part(w, x):
        hidden = jax.nn.relu(x @ w["a"] + w["bias"][None])  # [rows, part of the width]
        whole = lax.all_gather(hidden, "i", axis=1, tiled=True)
        own = lax.psum_scatter(whole * whole, "i", scatter_dimension=1, tiled=True)
        swapped = lax.all_to_all(whole[:4], "i", 0, 1, tiled=True)  # [rows / 4, 4 x width]
        back = lax.all_to_all(swapped, "i", 1, 0, tiled=True)
        return lax.psum((hidden + own) @ w["b"], "i") + lax.psum(back.sum(), "i")

    specs = {"a": P(None, "i"), "bias": P("i"), "b": P("i", None)}
    net = jax.shard_map(part, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)
    groups, _ = check([Trace(net, (XS[0],))], WEIGHTS)
    assert [group.size for group in groups.values()] == [16 // DEVICES]


def test_state_and_idle_leaves_are_found_inside_of_a_map(mesh):
    weights = WEIGHTS | {"shift": draw(16), "idle": draw(5, 7)}

    def part(w, x):
        hidden = lax.pmean(x @ w["a"], "i") - lax.stop_gradient(w["shift"])[None]
        return jax.nn.relu(hidden) @ w["b"] + w["bias"][None, :2]

    net = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("i")), out_specs=P())
    groups = structure.find_groups(net, weights, XS.reshape(-1, 3))
    assert groups.model.parameters == {"a", "b", "bias", "idle"}
    assert {name: group.size for name, group in groups.items()} == {"a:1": 16}
    reasons = {(f.path, f.dimension): f.reason for f in groups.frozen}
    assert "no traced function uses" in reasons["idle", 0]


# ---- meshes with explicit axes: the types of arrays say how they are split


@pytest.fixture
def explicit():
    axes = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axes, devices=jax.devices()[:DEVICES])
    with jax.set_mesh(mesh):
        yield mesh


def product(x, kernel, out="model"):
    return jnp.einsum("bi,io->bo", x, kernel, out_sharding=P("data", out))


def mlp(w, x):
    return product(jax.nn.relu(product(x, w["a"])), w["b"], None)


def fused(w, x):
    q, k, v = jnp.split(product(x, w["qkv"]) * jnp.arange(48.0)[None], 3, -1)
    return product(jax.nn.relu(q * k + v), w["b"], None)


def dropped(w, x):
    hidden = product(x, w["a"], None)
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, hidden.shape)
    return product(hidden * jax.sharding.reshard(kept, P("data", None)), w["b"], None)


@functools.partial(jax.sharding.auto_axes, out_sharding=P("data", None))
def automatic(w, x):
    return jax.nn.relu(x @ w["a"]) @ w["b"]


EXPLICIT = {
    "products": mlp,
    "lookup": lambda w, x: mlp(w, w["table"].at[jnp.arange(8)].get(out_sharding=P("data", None))),
    "auto_axes": automatic,
    "reshard": lambda w, x: mlp(w, jax.sharding.reshard(x, P("data", None))),
    "reshapes": lambda w, x: mlp(w, x.reshape(8, 2, 3).reshape(8, 6)),
    "slices of a width that is split": fused,
    "dropout": dropped,
    "scan": lambda w, x: lax.scan(lambda c, _: (jnp.tanh(c) + fused(w, c), None), x, None, 2)[0],
    "remat": lambda w, x: jax.checkpoint(fused)(w, x),
}


def placed(explicit):
    specs = {"a": P(None, "model"), "qkv": P(None, "model"), "b": P("model", None), "table": P()}
    shapes = {"a": (6, 16), "qkv": (6, 48), "b": (16, 6), "table": (8, 6)}
    weights = {n: jax.device_put(draw(*shape), specs[n]) for n, shape in shapes.items()}
    return weights, jax.device_put(draw(8, 6), P("data", None))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPLICIT)
def test_meshes_with_explicit_axes(name, explicit):
    function, (weights, x) = EXPLICIT[name], placed(explicit)
    groups = structure.find_groups(function, weights, x)
    (width,) = [group.size for group in groups.values() if "b" in {m.path for m in group.members}]
    assert width == 16
    for kept in (np.arange(16) % 4 < 2, np.isin(np.arange(16), (0, 3))):
        plan = groups.plan({n: kept for n, group in groups.items() if group.size == 16}, multiple=1)
        assert plan.verify(function, weights, x) < 1e-5
        output = plan.wrap(function)(plan.compact(weights), x)
        assert output.sharding.spec == P("data", None)


def test_names_and_settings_of_operations_are_kept():
    def function(w, x):
        with jax.named_scope("hidden"):
            hidden = jax.jit(lambda x: jnp.sin(x @ w["a"]))(x)
        return hidden @ w["b"]

    plan = structure.find_groups(function, WEIGHTS, XS[0]).plan(
        {"a:1": np.arange(16) < 4}, multiple=1
    )
    jaxpr = jax.make_jaxpr(plan.wrap(function))(plan.compact(WEIGHTS), XS[0]).jaxpr
    names = {e.primitive.name: str(e.source_info.name_stack) for e in jaxpr.eqns}
    assert names["sin"].startswith("hidden") and names["dot_general"] == ""


# ---- whole layers


def residual_layers(w, x):
    x = x @ w["in"]
    for layer in w["list"]:
        x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]

    def body(x, layer):
        return x + jax.nn.relu(x @ layer["up"]) @ layer["down"], None

    return lax.scan(body, x, w["stack"])[0] @ w["out"]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_layers_are_removed_from_split_arrays(kind):
    """Batch and widths of layers are split; what is left stays split in the same way."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2, devices=jax.devices()[:4])
    layer = {"up": P(None, "model"), "down": P("model", None)}
    stacked = {name: P(None, *spec) for name, spec in layer.items()}
    specs = {"in": P(), "list": [layer] * 2, "stack": stacked, "out": P()}
    parts = {"up": 0.3 * draw(4, 8, 12), "down": 0.3 * draw(4, 12, 8)}
    weights = {
        "in": draw(6, 8),
        "list": [jax.tree.map(lambda leaf, n=n: leaf[n], parts) for n in range(2)],
        "stack": parts,
        "out": draw(8, 3),
    }
    x = draw(4, 6)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs, is_leaf=_is_spec)
        split = jax.device_put(weights, places)
        rows = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        call = residual_layers if kind == AxisType.Auto else explicit_layers
        groups = structure.find_groups(call, split, rows)
        assert [(name, b.size) for name, b in groups.blocks.items()] == [
            ("list/0/down", 1),
            ("list/1/down", 1),
            ("stack/down", 4),
        ]
        keep = {"list/1/down": np.array([False]), "stack/down": np.arange(4) % 2 == 0}
        plan = groups.plan(keep)
        small = plan.compact(split)
        out = jax.jit(plan.wrap(call))(small, rows)
    assert small["list"][1]["up"] is None and small["stack"]["up"].shape == (2, 8, 12)
    assert small["stack"]["up"].sharding.is_equivalent_to(split["stack"]["up"].sharding, 3)
    np.testing.assert_allclose(out, residual_layers(plan.mask(weights), x), atol=1e-4)


def explicit_layers(w, x):
    """The same, which says how the results of its products are split."""
    rows = P("data", None)

    def layer(x, own):
        hidden = jnp.einsum("bd,dh->bh", x, own["up"], out_sharding=P("data", "model"))
        return x + jnp.einsum("bh,hd->bd", jax.nn.relu(hidden), own["down"], out_sharding=rows)

    x = jnp.einsum("bf,fd->bd", x, w["in"], out_sharding=rows)
    for own in w["list"]:
        x = layer(x, own)
    x, _ = lax.scan(lambda x, own: (layer(x, own), None), x, w["stack"])
    return x @ w["out"]


def _is_spec(node):
    return isinstance(node, P)
