"""States are trees that Flax, Orbax and tools for shardings can walk, box by box.

NNX keeps each array in a variable, and Linen can box it with the names of its axes. A state of
pruning has nothing for the leaves that are not pruned, neither an array nor a box around nothing.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune

METHODS = {
    "agip": jaxprune.agip_transform(0.5, stop=2, every=1),
    "magnitude": jaxprune.magnitude_transform(0.5, stop=2, every=1),
    "straight_through": jaxprune.straight_through_transform(0.5, stop=2),
    "fixed": jaxprune.fixed_mask_transform(),
}
METHODS = {name: jaxprune.chain(optax.adam(0.1), own) for name, own in METHODS.items()}
X = jnp.linspace(-1, 1, 32).reshape(8, 4)


def mesh():
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        def linear(width, out, *axes):
            init = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()
            kernel, bias = nnx.with_partitioning(init[0], axes), init[1]
            bias = nnx.with_partitioning(bias, axes[1:])
            return nnx.Linear(width, out, kernel_init=kernel, bias_init=bias, rngs=rngs)

        self.hidden = linear(4, 8, "data", "model")
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = linear(8, 2, "model", "data")

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.hidden(x))))


def make(tx):
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    gradients = nnx.grad(lambda model: jnp.mean((model(X) - 1) ** 2))(model)
    optimizer.update(model, gradients)


def variables(state):
    return [leaf for _, leaf in nnx.to_flat_state(state)]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_variable_of_an_nnx_optimizer_holds_an_array(name):
    with jax.set_mesh(mesh()):
        model, optimizer = make(METHODS[name])
        for _ in range(2):
            state = nnx.state(optimizer)
            assert all(isinstance(v.get_value(), jax.Array) for v in variables(state))
            shapes = [(v.shape, v.dtype) for v in variables(state)]
            step(model, optimizer)
        assert shapes == [(v.shape, v.dtype) for v in variables(nnx.state(optimizer))]
        masks = jaxprune.get_masks(optimizer.opt_state)
        assert masks["hidden"]["bias"].shape == () and masks["hidden"]["kernel"].shape == (4, 8)


@pytest.mark.parametrize("name", METHODS)
def test_shapes_and_shardings_of_an_nnx_optimizer(name):
    with jax.set_mesh(mesh()):
        _, optimizer = make(METHODS[name])
        state = nnx.state(optimizer, nnx.optimizer.OptState)
        abstract = nnx.eval_shape(lambda: make(METHODS[name])[1])
        shapes = nnx.state(abstract, nnx.optimizer.OptState)
        assert [v.shape for v in variables(shapes)] == [v.shape for v in variables(state)]
        for made in (nnx.get_named_sharding(state, mesh()), nnx.get_named_sharding(shapes, mesh())):
            arrays = nnx.to_pure_dict(state)
            wanted = nnx.to_pure_dict(made)
            same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), arrays, wanted)
            assert len(jax.tree.leaves(same)) == len(jax.tree.leaves(arrays))
            kernels = same["opt_state"][0][0]["mu"]
            assert kernels["hidden"]["kernel"] and kernels["head"]["kernel"]
        specs = nnx.get_partition_spec(state)
        # A full fine-tuning loop shards the state so.
        sharded = jax.jit(lambda x: jax.lax.with_sharding_constraint(x, specs))(state)
        nnx.update(optimizer, sharded)
        assert repr(specs) and str(nnx.get_named_sharding(state, mesh())) and repr(optimizer)


@pytest.mark.parametrize("name", ["agip", "magnitude"])
def test_an_nnx_optimizer_comes_back_from_orbax(name, tmp_path):
    with jax.set_mesh(mesh()):
        model, optimizer = make(METHODS[name])
        step(model, optimizer)
        state = nnx.state(optimizer)
        abstract = nnx.state(nnx.eval_shape(lambda: make(METHODS[name])[1]))
        target = jax.tree.map(
            lambda shape, own: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=own.sharding
            ),
            abstract,
            state,
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", target)
        again = make(METHODS[name])[1]
        nnx.update(again, restored)
        for own in (optimizer, again):
            twin = nnx.clone(model)
            step(twin, own)
            step(twin, own)
        ours, theirs = nnx.to_pure_dict(nnx.state(optimizer)), nnx.to_pure_dict(nnx.state(again))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        boxed = functools.partial(nn.with_partitioning, mesh=None)
        kernel = nn.initializers.lecun_normal()
        x = nn.Dense(8, kernel_init=boxed(kernel, ("data", "model")))(x)
        x = nn.relu(nn.LayerNorm(scale_init=boxed(nn.initializers.ones_init(), ("model",)))(x))
        return nn.Dense(2, kernel_init=boxed(kernel, ("model", "data")))(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_boxes_of_linen_hold_arrays(name):
    model, devices = LinenNet(), mesh()

    def create():
        params = model.init(jax.random.key(0), X)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=METHODS[name])

    abstract = jax.eval_shape(create)

    def is_box(node):
        return isinstance(node, nn.Partitioned)

    boxes = filter(is_box, jax.tree.leaves(abstract.opt_state, is_leaf=is_box))
    assert all(len(box.names) == box.value.ndim for box in boxes)
    specs = nn.get_partition_spec(abstract)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(devices, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    state = jax.jit(create, out_shardings=shardings)()
    jax.tree.map(lambda x, _: x, nn.unbox(state.opt_state), shardings.opt_state)  # the same tree

    @jax.jit
    def train(state):
        gradients = jax.grad(lambda p: jnp.mean((state.apply_fn({"params": p}, X) - 1) ** 2))
        return state.apply_gradients(grads=gradients(state.params))

    for _ in range(3):
        state = train(state)
    assert jaxprune.check(state.params, state.opt_state).ok
