"""Meshes from text, and where parameters and all that belongs to them lie."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import models, sharding, training, trees

MESH = AbstractMesh((4, 2), ("data", "fsdp"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data=8", {"data": 8}),
        ("data=4,fsdp=2", {"data": 4, "fsdp": 2}),
        (" fsdp = 2 , data=1 ", {"fsdp": 2, "data": 1}),
    ],
)
def test_parse_mesh(text, expected):
    axes = sharding.parse_mesh(text)
    assert axes == expected
    assert list(axes) == list(expected), "the order of the text is that of the mesh"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'': has no size; write for example data=8"),
        ("data", "'data': has no size; write for example data=8"),
        ("data=", "'data=': a size must be an integer of at least 1"),
        ("data=0", "'data=0': a size must be an integer of at least 1"),
        ("data=-1", "'data=-1': a size must be an integer of at least 1"),
        ("data=2.5", "'data=2.5': a size must be an integer of at least 1"),
        ("data=²", "'data=²': a size must be an integer of at least 1"),
        ("model=2", "'model=2': no such axis; use data or fsdp"),
        ("data=2,data=4", "'data=4': data occurs twice; name each axis once"),
        ("data=4,", "'': has no size"),
    ],
)
def test_parse_mesh_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sharding.parse_mesh(text)
    assert "`mesh` must be axes and sizes such as data=4,fsdp=2" in str(error.value)
    assert repr(text) in str(error.value)


def test_parse_mesh_lists_all_problems():
    with pytest.raises(ValueError, match="(?s)no such axis.*at least 1"):
        sharding.parse_mesh("model=2,data=x")


def test_make_mesh():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2} and mesh.size == jax.device_count()
    assert mesh.axis_types == (AxisType.Auto,) * 2
    assert sharding.make_mesh({"data": 2}, jax.devices()[:2]).size == 2


@pytest.mark.parametrize(
    ("axes", "count", "fix"),
    [
        ({"data": 4}, 8, "data=8"),
        ({"data": 4, "fsdp": 2}, 4, "data=2,fsdp=2"),
        ({"data": 3, "fsdp": 3}, 8, "data=8"),
        ({"fsdp": 16}, 8, "data=8"),
    ],
)
def test_make_mesh_names_one_that_fits(axes, count, fix):
    with pytest.raises(ValueError, match=rf"there are {count}; use for example {fix}\.$") as error:
        sharding.make_mesh(axes, jax.devices()[:count])
    assert "`mesh` must use every device" in str(error.value)
    sharding.make_mesh(sharding.parse_mesh(fix), jax.devices()[:count])


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 128), (None, None, None, "fsdp")),
        ((3, 3, 128, 64), (None, None, "fsdp")),
        ((1, 1, 64, 64), (None, None, None, "fsdp")),  # a tie: the last
        ((2048, 1001), ("fsdp",)),  # the larger, and the only one that divides
        ((4097, 3), ()),  # none divides
        ((4095,), ()),  # small
        ((63, 65), ()),
        ((), ()),
    ],
)
def test_spec_for(shape, spec):
    assert tuple(sharding.spec_for(shape, MESH)) == spec
    for whole in (AbstractMesh((8,), ("data",)), AbstractMesh((8, 1), ("data", "fsdp"))):
        assert tuple(sharding.spec_for(shape, whole)) == ()


def test_min_size():
    assert tuple(sharding.spec_for((4, 2), MESH, min_size=8)) == ("fsdp",)
    assert tuple(sharding.spec_for((4, 2), MESH, min_size=9)) == ()


OPTIMIZERS = {
    "agip": jaxprune.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9),
        jaxprune.agip_transform(0.5, every=2, stop=4),
    ),
    "adam, rigl": jaxprune.chain(optax.adam(0.1), jaxprune.rigl_transform(0.5, every=2, stop=4)),
    "straight-through": jaxprune.chain(
        optax.lion(0.1), jaxprune.straight_through_transform(0.5, every=2, stop=4)
    ),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=32),
    "masked": optax.masked(optax.adam(0.1), {"kernel": True, "bias": False, "narrow": True}),
}  # fmt: skip
SHAPES = {"kernel": (64, 128), "bias": (128,), "narrow": (8, 9)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_follow_their_parameters(name):
    """By path; optax's own map over what mirrors parameters says the same."""
    tx = OPTIMIZERS[name]
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in SHAPES.items()}
    state = jax.eval_shape(tx.init, params)
    found = sharding.shardings_for(state, MESH, params=params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    places = sharding.shardings_for(params, MESH)
    assert tuple(places["kernel"].spec) == (None, "fsdp") and not tuple(places["narrow"].spec)

    whole = NamedSharding(MESH, P())

    def expected(leaf: Any, param: Any, place: Any) -> Any:
        return place if not trees.is_absent(leaf) and leaf.shape == param.shape else whole

    mirrored = optax.tree_utils.tree_map_params(
        tx,
        expected,
        state,
        params,
        places,
        transform_non_params=lambda _: whole,
        is_leaf=trees.is_absent,
    )
    wanted = trees.leaf_by_path(mirrored)
    for path, own in trees.leaf_by_path(found).items():
        assert own.spec == wanted[path].spec, path
    split = [leaf for leaf in jax.tree.leaves(found) if tuple(leaf.spec)]
    assert len(split) > 0 or name == "adafactor"


def test_the_state_of_a_network():
    """Parameters and momentum are split, running statistics are not."""
    tx = OPTIMIZERS["agip"]
    model = nnx.eval_shape(lambda: models.resnet8(rngs=nnx.Rngs(0)))
    _, *states = nnx.split(model, nnx.Param, ...)
    params, model_state = map(nnx.to_pure_dict, states)
    opt_state = jax.eval_shape(tx.init, params)
    state = training.TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, model_state, opt_state)
    found = sharding.shardings_for(state, MESH, params=params)
    specs = {path: tuple(own.spec) for path, own in trees.leaf_by_path(found).items()}
    kernel = "blocks/2/conv2/kernel"
    owners = [path for path in specs if path.endswith(f"/{kernel}")]
    assert len(owners) == 4, "the parameter, its momentum, mask and statistic"
    assert {specs[path] for path in owners} == {(None, None, None, "fsdp")}
    split = {path for path, spec in specs.items() if spec}
    assert all(path.endswith("/kernel") for path in split) and "step" in specs.keys() - split


def test_a_state_of_nnx_variables():
    """Their paths end in `.value` in some trees and not in others."""
    model = models.resnet8(rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    state = optax.trace(0.9).init(params)
    found = sharding.shardings_for(state, MESH, params=params)
    assert len([own for own in jax.tree.leaves(found) if tuple(own.spec)]) == 4


@pytest.mark.slow
def test_training_on_split_parameters_gives_the_masks_of_whole_ones():
    random = np.random.default_rng(0)
    params = {
        name: jnp.asarray(random.standard_normal(shape), jnp.float32)
        for name, shape in SHAPES.items()
    }
    tx = OPTIMIZERS["agip"]

    def step(params: Any, state: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((x @ params["kernel"] + params["bias"][None]) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    found = []
    for axes in ({"data": 8}, {"data": 4, "fsdp": 2}):
        mesh = sharding.make_mesh(axes)
        state = tx.init(params)
        places = [sharding.shardings_for(tree, mesh, params=params) for tree in (params, state)]
        run = jax.jit(step, out_shardings=tuple(places))
        own = jax.tree.map(jax.device_put, [params, state], places)
        for i in range(5):
            x = np.random.default_rng(i).standard_normal((16, 64)).astype(np.float32)
            own = run(*own, jax.device_put(x, sharding.batch_sharding(mesh)))
        found.append(own)
        shard = own[0]["kernel"].addressable_shards[0].data.shape
        assert shard == ((64, 128) if axes["data"] == 8 else (64, 64))
        for tree in (own[1][-1].masks, own[1][-1].gradient_average):
            assert tree["kernel"].addressable_shards[0].data.shape == shard
    (params, state), (split, split_state) = found
    for name, mask in state[-1].masks.items():
        if name != "bias":
            np.testing.assert_array_equal(mask, split_state[-1].masks[name])
    for name, leaf in params.items():
        np.testing.assert_allclose(leaf, split[name], rtol=1e-5, atol=1e-6)
