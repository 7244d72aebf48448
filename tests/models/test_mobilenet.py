"""Networks for phones: published sizes, parity with NumPy, removal of channels, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import models, structure, trees
from jaxprune.models import MobileNet, Widths, default_widths
from jaxprune.models._layers import shifted_depthwise

NAMES = ["mobilenet_v1", "mobilenet_v2", "efficientnet_lite0"]


def narrow(name: str) -> Widths:
    """Eight channels, six more for each further stream; half as many inside of a block again."""
    published = default_widths(name)
    streams = sorted({published.stem, *(block[-1] for block in published.blocks)})

    def block(widths):
        out = 8 + 2 * streams.index(widths[-1])
        return (out,) if len(widths) == 1 else (out + out // 2, out)

    blocks = tuple(map(block, published.blocks))
    return Widths(8 + 2 * streams.index(published.stem), blocks, published.head and 20)


def filled(name: str, seed: int = 0, **options) -> MobileNet:
    """The network with values from NumPy; nothing is drawn or compiled."""
    model = nnx.eval_shape(lambda: MobileNet(name, rngs=nnx.Rngs(0), **options))
    state, rng = nnx.state(model), np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(state):
        if path[-1] == "kernel":
            values = rng.normal(size=leaf.shape) * math.sqrt(2 / math.prod(leaf.shape[:-1]))
        elif path[-1] == "mean" or path[-1] == "bias":
            values = 0.1 * rng.normal(size=leaf.shape)
        else:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        leaf.set_value(jnp.asarray(values, jnp.float32))
    nnx.update(model, state)
    model.eval()
    return model


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


# ---- sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("mobilenet_v1", 4_231_976, 569),
        ("mobilenet_v2", 3_504_872, 301),
        ("efficientnet_lite0", 4_652_008, 385),
    ],
)
def test_parameters_and_macs_are_the_published_ones(name, parameters, macs):
    model = nnx.eval_shape(lambda: getattr(models, name)(rngs=nnx.Rngs(0)))
    model.eval()
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    functions = structure.from_nnx(model)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    counted = structure.count_macs(functions.evaluate, functions.variables, image)
    assert round(counted / 1e6) == macs


# ---- parity with NumPy


def numpy_conv(x, kernel, stride):
    """Pads as TensorFlow does; a kernel [h, w, 1, C] on C channels is depthwise."""
    size = kernel.shape[0]
    out = [-(-n // stride) for n in x.shape[1:3]]
    pads = [max((m - 1) * stride + size - n, 0) for m, n in zip(out, x.shape[1:3])]
    x = np.pad(x, [(0, 0), *((p // 2, p - p // 2) for p in pads), (0, 0)])
    depthwise = kernel.shape[2] == 1 and x.shape[-1] == kernel.shape[3]
    total = 0.0
    for i in range(size):
        for j in range(size):
            rows, columns = (slice(k, k + stride * m, stride) for k, m in zip((i, j), out))
            window = x[:, rows, columns]
            total = total + (window * kernel[i, j, 0] if depthwise else window @ kernel[i, j])
    return total


def numpy_forward(name, leaves, widths, x):
    def layer(path, x, stride, act=True):
        x = numpy_conv(x, leaves[f"{path}/conv/kernel"], stride)
        scale, bias, mean, var = (
            leaves[f"{path}/norm/{key}"] for key in ("scale", "bias", "mean", "var")
        )
        x = (x - mean) / np.sqrt(var + 1e-3) * scale + bias
        return np.clip(x, 0, 6) if act else x

    x = layer("stem", x, 2)
    strides = {
        "mobilenet_v1": [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1],
        "mobilenet_v2": [1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1],
        "efficientnet_lite0": [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1],
    }[name]
    # The first block of each stage does not add its input.
    firsts = {
        "mobilenet_v2": {0, 1, 3, 6, 10, 13, 16},
        "efficientnet_lite0": {0, 1, 3, 5, 8, 11, 15},
    }
    for index, (block, stride) in enumerate(zip(widths.blocks, strides, strict=True)):
        here, y = f"blocks/{index}", x
        if len(block) == 2:
            y = layer(f"{here}/expand", y, 1)
        y = layer(f"{here}/depthwise", y, stride)
        y = layer(f"{here}/project", y, 1, act=name == "mobilenet_v1")
        x = x + y if name in firsts and index not in firsts[name] else y
    if widths.head:
        x = layer("last", x, 1)
    return x.mean((1, 2)) @ leaves["head/kernel"] + leaves["head/bias"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_numpy(name):
    model, x = filled(name, widths=narrow(name), num_classes=7), images(2, 45, 38, 3)
    leaves = {
        "/".join(map(str, path)): np.asarray(leaf[...], np.float64)
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    expected = numpy_forward(name, leaves, narrow(name), x.astype(np.float64))
    assert np.abs(expected).max() > 0.1
    actual = nnx.jit(MobileNet.__call__)(model, x)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


# ---- removal of channels


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_most_parameters_shrink_and_nothing_changes(name):
    """Of the published network; half of every group goes from a narrow one."""
    model = nnx.eval_shape(lambda: MobileNet(name, rngs=nnx.Rngs(0)))
    functions = structure.from_nnx(model)
    groups = structure.find_groups(functions.traces(images(2, 32, 32, 3)), functions.variables)
    reached = {member.path for group in groups.values() for member in group.members}
    sizes = {path: leaf.size for path, leaf in trees.leaf_by_path(functions.variables).items()}
    params = {path: size for path, size in sizes.items() if path.startswith("params/")}
    covered = sum(size for path, size in params.items() if path in reached)
    assert covered >= 0.98 * sum(params.values())

    model = filled(name, widths=narrow(name), num_classes=7)
    functions = structure.from_nnx(model)
    x = images(2, 32, 32, 3)
    groups = structure.find_groups(functions.traces(x), functions.variables)
    keep = {g: np.arange(group.size) % 2 == 0 for g, group in groups.items()}
    plan = groups.plan(keep, multiple=1)
    small = plan.compact(functions.variables)
    masked = jax.jit(functions.evaluate)(plan.mask(functions.variables), x)
    wrapped = jax.jit(plan.wrap(functions.evaluate))(small, x)
    np.testing.assert_allclose(wrapped, masked, atol=1e-4)

    widths = models.widths_of(small["params"])
    rebuilt = filled(name, widths=widths, num_classes=7)
    nnx.update(rebuilt, small["params"])
    nnx.update(rebuilt, small["state"])
    np.testing.assert_allclose(rebuilt(x), masked, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_widths_of_a_network_are_those_that_it_was_built_with(name):
    for widths in (default_widths(name), narrow(name)):
        model = nnx.eval_shape(lambda own=widths: MobileNet(name, widths=own, rngs=nnx.Rngs(0)))
        assert models.widths_of(nnx.state(model, nnx.Param)) == widths


# ---- bad input


def test_wrong_widths_are_all_named():
    widths = narrow("mobilenet_v2")
    blocks = list(widths.blocks)
    blocks[2] = (12, blocks[2][1] + 1)  # adds its input
    blocks[5] = (12,)
    blocks[6] = (0, blocks[6][1])
    with pytest.raises(ValueError) as error:
        MobileNet("mobilenet_v2", widths=Widths(True, tuple(blocks)), rngs=nnx.Rngs(0))
    text = str(error.value)
    for part in (
        "head: None must be a width",
        "blocks/2: out = 11 must be 10 as in blocks/1, because the block adds its input",
        "blocks/5: (12,) must be (expanded, out)",
        "blocks/6: expanded = 0 must be a positive integer",
        "stem = True must be a positive integer",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_classes": 0}, "`num_classes` must be at least 1; got 0"),
        ({"widths": Widths(8, ((8,),) * 3)}, "blocks: there are 3; give 13, one per block"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        MobileNet("mobilenet_v1", rngs=nnx.Rngs(0), **options)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="one of mobilenet_v1, mobilenet_v2, efficientnet_lite0"):
        MobileNet("mobilenet_v3", rngs=nnx.Rngs(0))


# ---- phones: multipliers, symmetric padding, depthwise convolutions as sums


@pytest.mark.parametrize(
    ("name", "multiplier", "parameters"),
    [
        ("mobilenet_v1", 0.25, 470_072),
        ("mobilenet_v1", 0.5, 1_331_592),
        ("mobilenet_v1", 0.75, 2_585_560),
        ("mobilenet_v2", 0.5, 1_968_680),
        ("mobilenet_v2", 0.75, 2_636_424),
        ("mobilenet_v2", 1.4, 6_108_776),
    ],
)
def test_scaled_networks_have_the_published_sizes(name, multiplier, parameters):
    widths = default_widths(name, multiplier)
    model = nnx.eval_shape(lambda: MobileNet(name, widths=widths, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


@pytest.mark.parametrize(
    ("name", "multiplier"), [("resnet8", 0.5), ("mobilenet_v1", 0), ("mobilenet_v2", np.inf)]
)
def test_multipliers_that_do_not_apply_are_refused(name, multiplier):
    with pytest.raises(ValueError, match="`multiplier` must be positive"):
        default_widths(name, multiplier)


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match='`padding` must be "SAME" or "SYMMETRIC"; got .VALID.'):
        MobileNet("mobilenet_v1", padding="VALID", rngs=nnx.Rngs(0))


def test_symmetric_padding_is_the_same_on_both_sides():
    """Sparse inference needs it: at stride 2, SAME pads even images at the end only."""
    model = nnx.eval_shape(lambda: MobileNet("mobilenet_v1", padding="SYMMETRIC", rngs=nnx.Rngs(0)))
    model.eval()
    functions = structure.from_nnx(model)
    traced = jax.make_jaxpr(functions.evaluate)(
        functions.variables, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    )
    paddings = {
        (equation.params["padding"], equation.params["rhs_dilation"])
        for equation in traced.eqns
        if equation.primitive.name == "conv_general_dilated"
        and equation.invars[1].aval.shape[0] == 3
    }
    assert paddings == {(((1, 1), (1, 1)), (1, 1))}


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(
    ("height", "width", "strides", "padding"),
    [
        (6, 5, 1, "SAME"),
        (6, 5, 2, "SAME"),
        (7, 7, (2, 1), 1),
        (6, 8, 2, 2),
        (5, 6, 2, [(1, 0)] * 2),
    ],
)
def test_shifted_images_are_a_depthwise_convolution(height, width, strides, padding, size):
    x = images(2, height, width, 4)
    kernel = np.random.default_rng(2).normal(size=(size, size, 1, 4)).astype(np.float32)
    both = (strides, strides) if isinstance(strides, int) else strides
    pads = [(padding, padding)] * 2 if isinstance(padding, int) else padding

    def convolution(x, kernel):
        form = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, both, pads, dimension_numbers=form, feature_group_count=4
        )

    def shifted(x, kernel):
        return shifted_depthwise(x, kernel, strides, padding)

    wanted, pull = jax.vjp(convolution, x, kernel)
    actual, own_pull = jax.vjp(shifted, x, kernel)
    np.testing.assert_allclose(actual, wanted, atol=1e-5)
    cotangent = images(*wanted.shape)
    for own, right in zip(own_pull(cotangent), pull(cotangent), strict=True):
        np.testing.assert_allclose(own, right, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["SAME", "SYMMETRIC"])
def test_network_of_shifted_images_equals_the_network(padding):
    own = {"widths": narrow("mobilenet_v2"), "num_classes": 7, "padding": padding}
    x = images(2, 24, 30, 3)
    plain, shifted = (filled("mobilenet_v2", shifted=flag, **own) for flag in (False, True))
    wanted = nnx.jit(MobileNet.__call__)(plain, x)
    actual = nnx.jit(MobileNet.__call__)(shifted, x)
    np.testing.assert_allclose(actual, wanted, atol=1e-4 * np.abs(wanted).max())
    text = str(jax.make_jaxpr(structure.from_nnx(shifted).evaluate)(
        structure.from_nnx(shifted).variables, x))  # fmt: skip
    assert "feature_group_count=1\n" in text and "feature_group_count=12" not in text
