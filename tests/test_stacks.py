"""What is stacked is found in every framework, or asked for; nothing is guessed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxprune import stacks, trees

LAYERS = 3


def _axes(params, stacked):
    """The stacked axes of all leaves that have some."""
    return {path: axes for path, axes in stacks.axes_of(params, stacked).items() if axes}


# ---- under


def test_under_states_it():
    params = {
        "layers": {"kernel": jnp.zeros((3, 4, 5)), "bias": jnp.zeros((3, 5))},
        "layers_norm": jnp.zeros((4, 4)),
        "experts": jnp.zeros((5, 3, 4)),
    }
    both = {"layers/bias": (0,), "layers/kernel": (0,)}
    assert _axes(params, stacks.under("layers")) == both
    assert _axes(params, stacks.under("layers/")) == both
    assert _axes(params, stacks.under("experts", axis=-2)) == {"experts": (1,)}
    assert _axes(params, stacks.under("experts", axis=(0, 1))) == {"experts": (0, 1)}
    assert _axes(params, stacks.under("layers", "experts")) == both | {"experts": (0,)}
    assert len(_axes(params, stacks.under(""))) == 4
    with pytest.raises(ValueError, match="`prefixes` must name"):
        stacks.under()


def test_a_rule_that_matches_nothing_is_an_error():
    params = {"layers": {"kernel": jnp.zeros((3, 4, 5))}}
    with pytest.raises(ValueError, match=r"`stacked` matches no leaf(.|\n)*layers/kernel: shape"):
        stacks.axes_of(params, stacks.under("layer"))
    assert stacks.axes_of(params, None) == {"layers/kernel": ()}
    assert stacks.axes_of({}, stacks.under("layers")) == {}


# ---- from_layer


def test_from_layer_finds_the_axis_that_one_layer_does_not_have():
    one = {"attention": {"kernel": jnp.zeros((4, 4))}, "scale": jnp.zeros(4)}
    shared = {"attention": {"kernel": jnp.zeros((4, 3, 4))}, "scale": jnp.zeros(4)}
    assert _axes({"layers": shared}, stacks.from_layer(one, "layers", axis=1)) == {
        "layers/attention/kernel": (1,)
    }
    # Only shapes are needed, and the whole tree may be a stack.
    shapes = jax.eval_shape(lambda: one)
    ensemble = jax.tree.map(lambda leaf: jnp.zeros((2, 3, *leaf.shape)), one)
    assert _axes(ensemble, stacks.from_layer(shapes, axis=(0, 1))) == {
        "attention/kernel": (0, 1),
        "scale": (0, 1),
    }


@pytest.mark.parametrize(
    ("tree", "axis", "message"),
    [
        ({"a": jnp.zeros((3, 4, 5))}, 1, r"`axis` 1 .*a: its shape is \(3, 4, 5\).*\(4, 5\)"),
        ({"a": jnp.zeros(4)}, 0, r"`axis` 0 .*\(4,\), that of one layer is \(4, 5\)"),
        ({"b": jnp.zeros((3, 4))}, 0, "has no b for b. It has: a"),
    ],
)
def test_from_layer_does_not_guess(tree, axis, message):
    stacked = stacks.from_layer({"a": jnp.zeros((4, 5))}, axis=axis)
    with pytest.raises(ValueError, match=message):
        stacks.axes_of(tree, stacked)
    with pytest.raises(ValueError, match="`layer` must be a tree of arrays"):
        stacks.from_layer({"act": jax.nn.relu})


def test_from_layer_on_equinox():
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        norm: eqx.nn.LayerNorm
        mlp: eqx.nn.MLP

        def __init__(self, key):
            self.norm = eqx.nn.LayerNorm(8)
            self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=key)

    keys = jax.random.split(jax.random.key(0), LAYERS)
    params = {"layers": eqx.filter_vmap(Block)(keys)}
    stacked = stacks.from_layer(Block(keys[0]), "layers")
    assert set(_axes(params, stacked).values()) == {(0,)}
    chosen = [p for p, r in trees.reasons(params, stacks.axes_of(params, stacked)).items() if not r]
    assert chosen == ["layers/mlp/layers/0/weight", "layers/mlp/layers/1/weight"]


def test_from_layer_on_haiku():
    hk = pytest.importorskip("haiku")

    def block(x):
        return hk.LayerNorm(-1, True, True)(hk.Linear(8)(x))

    def net(x):
        return hk.Linear(2)(hk.experimental.layer_stack(LAYERS)(block)(x))

    x = jnp.ones((2, 8))
    params = hk.transform(net).init(jax.random.key(0), x)
    one = hk.transform(block).init(jax.random.key(0), x)
    stacked = stacks.from_layer(one, "__layer_stack_no_per_layer")
    axes = _axes(params, stacked)
    assert len(axes) == 4 and set(axes.values()) == {(0,)}
    flags = trees.prunable_flags(params, stacked=stacked)
    chosen = [path for path, flag in zip(trees.leaf_by_path(params), flags, strict=True) if flag]
    assert chosen == ["__layer_stack_no_per_layer/linear/w", "linear/w"]


# ---- from_metadata


class Block(nn.Module):
    named: bool = True

    @nn.compact
    def __call__(self, x, _):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, ("in", "out")) if self.named else init
        return nn.LayerNorm()(nn.Dense(8, kernel_init=init)(x)), None


def _linen(axis=0, named=True):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = functools.partial(
                nn.scan,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=LAYERS,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return nn.Dense(2, name="head")(scan(Block)(named, name="layers")(x, None)[0])

    return Net().init(jax.random.key(0), jnp.ones((2, 8)))


@pytest.mark.parametrize("axis", [0, 1])
def test_from_metadata_on_linen(axis):
    variables = _linen(axis)
    stacked = stacks.from_metadata(variables)
    found = {"params/layers/Dense_0/bias": (axis,), "params/layers/Dense_0/kernel": (axis,)}
    assert _axes(variables, stacked) == found
    # The same paths without the boxes, as they are trained.
    assert _axes(nn.meta.unbox(variables), stacked) == found
    with pytest.raises(ValueError, match="comes from a tree without head/bias"):
        stacks.axes_of(variables["params"], stacked)
    with pytest.raises(ValueError, match="no axis named experts. Names seen: in, layers, out"):
        stacks.from_metadata(variables, "experts")


@pytest.mark.slow
def test_from_metadata_on_linen_without_names():
    with pytest.raises(ValueError, match="no axis named layers. Names seen: none. Ask"):
        stacks.from_metadata(_linen(named=False))


@pytest.mark.parametrize("axis", [0, 1])
def test_from_metadata_on_nnx(axis):
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(out_axes=axis, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make(rngs):
        init = nnx.with_metadata(
            nnx.initializers.lecun_normal(), out_sharding=("in", "out"), eager_sharding=False
        )
        return nnx.Linear(8, 4, kernel_init=init, rngs=rngs)

    class Net(nnx.Module):
        def __init__(self):
            self.layers = make(nnx.Rngs(0))
            self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    model = Net()
    params = nnx.state(model, nnx.Param)
    for tree in (model, params):
        stacked = stacks.from_metadata(tree)
        found = {"layers/bias": (axis,), "layers/kernel": (axis,)}
        assert _axes(params, stacked) == found
        # What an optimizer of NNX shows at updates.
        assert _axes(nnx.to_pure_dict(params), stacked) == found


def test_from_metadata_takes_several_names_and_shared_mesh_axes():
    box = nn.Partitioned(jnp.zeros((3, 2, 4, 5)), names=("layers", ("expert", "data"), None, "out"))
    tree = {"moe": {"w": box, "b": jnp.zeros((3, 2, 5))}}
    assert _axes(tree, stacks.from_metadata(tree)) == {"moe/w": (0,), "moe/b": (0,)}
    both = stacks.from_metadata(tree, "layers", "expert")
    assert _axes(tree, both) == {"moe/w": (0, 1), "moe/b": (0, 1)}


def test_from_metadata_asks_where_it_would_have_to_guess():
    box = nn.Partitioned(jnp.zeros((3, 4, 5)), names=("layers", "in", "out"))
    tree = {
        "layers": {"one": {"kernel": box}, "two": {"kernel": jnp.zeros((3, 5, 4))}},
        "norm": {"scale": jnp.zeros((3, 4))},
        "head": {"kernel": jnp.zeros((4, 2))},
    }
    with pytest.raises(ValueError, match="does not say whether these kernels") as error:
        stacks.from_metadata(tree)
    assert str(error.value).splitlines()[1:] == ["  layers/two/kernel: shape (3, 5, 4)"]


NAMES = ["kernel", "weight", "w", "b", "bias", "scale", "offset", "A_log", "D", "pos_embedding"]
NAMES += ["norm1/weight", "linear/w", "linear/b", "lora_a", "lora_b", "bn/mean", "cls_token"]


@given(
    shapes=st.dictionaries(st.sampled_from(NAMES), hnp.array_shapes(max_dims=3, max_side=3)),
    axis=st.integers(0, 1),
)
def test_a_stack_is_pruned_like_its_layer(shapes, axis):
    """Whatever the names: with `stacked`, the same leaves for the same reasons."""
    layer = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    stack = {
        f"layers/{name}": jax.ShapeDtypeStruct((*shape[:axis], 5, *shape[axis:]), jnp.float32)
        for name, shape in shapes.items()
    }
    stacked = stacks.from_layer(layer, "layers", axis=axis) if layer else None
    found = trees.reasons(stack, stacks.axes_of(stack, stacked))
    wanted = {f"layers/{name}": reason for name, reason in trees.reasons(layer).items()}
    assert found == wanted


def test_each_copy_of_a_stack_is_told_apart_from_a_matrix():
    """The number of layers is no dimension of a kernel: a stack of vectors is not pruned."""
    params = {"layers": {"mix": np.zeros((12, 64), np.float32), "kernel": np.zeros((12, 8, 8))}}
    stacked = stacks.under("layers")
    assert trees.prunable_flags(params) == (True, True)
    assert trees.prunable_flags(params, stacked=stacked) == (True, False)
