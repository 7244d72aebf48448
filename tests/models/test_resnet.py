"""Residual networks: published sizes, parity with NumPy, data parallelism, precision, bad input."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import models, patterns, structure, trees
from jaxprune.models import ResNet, Widths, default_widths

THIN = Widths(4, ((3, 4), (5, 8), (6, 12)))  # resnet8, all widths different
BOTTLENECK = (3, 4, 6, 3)


def thin_resnet50() -> Widths:
    """Middle widths that differ in each block, streams of 4, 6, 8 and 10 channels."""
    streams = [4 + 2 * stage for stage, depth in enumerate(BOTTLENECK) for _ in range(depth)]
    return Widths(3, tuple((1 + i % 3, 2 + i % 2, out) for i, out in enumerate(streams)))


def abstract(name: str, **options) -> ResNet:
    """The network without arrays: cheap, because nothing is drawn or compiled."""
    return nnx.eval_shape(lambda: getattr(models, name)(rngs=nnx.Rngs(0), **options))


def filled(name: str, **options):
    """(graphdef, parameters, statistics) with arrays from NumPy; no scale is zero."""
    graphdef, *states = nnx.split(abstract(name, **options), nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-2].key  # the last key is NNX's own `.value`
        if name == "kernel":
            values = rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        else:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return graphdef, *(jax.tree_util.tree_map_with_path(fill, state) for state in states)


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 1))
def apply(graphdef, train, params, stats, x):
    """Logits and new statistics."""
    model = nnx.merge(graphdef, params, stats)
    model.train() if train else model.eval()
    return model(x), nnx.state(model, nnx.BatchStat)


def flat(state) -> dict[str, np.ndarray]:
    """Leaves by path, such as "blocks/0/conv1/kernel"."""
    pairs = nnx.to_flat_state(state)
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in pairs}


def paths(model: ResNet) -> set[str]:
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def count(model: ResNet) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def assert_close(actual, expected, tolerance: float):
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), actual, expected
    )


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_imagenet_parameter_counts_are_the_published_ones(name, published):
    assert count(abstract(name)) == published


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 20, 32, 56, 110])
def test_cifar_parameter_counts_by_closed_form(depth):
    # With n blocks a stage and w in (16, 32, 64): 2n - 1 convolutions w -> w in each stage and one
    # w/2 -> w (16 -> 16 in the first), two norms a block, and two projections with their norms.
    n = (depth - 2) // 6
    stem, head = 27 * 16 + 2 * 16, 64 * 10 + 10
    convolutions = 9 * (2 * n * 256 + 512 + (2 * n - 1) * 1024 + 2048 + (2 * n - 1) * 4096)
    norms = 2 * 2 * n * (16 + 32 + 64)
    projections = 512 + 2048 + 2 * (32 + 64)
    expected = stem + convolutions + norms + projections + head
    assert count(abstract(f"resnet{depth}")) == expected
    rounded = {20: 0.27, 32: 0.46, 56: 0.85, 110: 1.7}  # He et al., table 6, with option A
    if depth in rounded:
        option_a = expected - projections
        assert abs(option_a / 1e6 - rounded[depth]) < 0.03 * rounded[depth]


@pytest.mark.slow
@given(
    widths=st.lists(st.integers(1, 9), min_size=9, max_size=9),
    num_classes=st.integers(1, 7),
    in_channels=st.integers(1, 4),
)
def test_widths_change_the_count_as_predicted(widths, num_classes, in_channels):
    stem, a, b, c, b_out, c_out = widths[:6]
    model = abstract(
        "resnet8",
        widths=Widths(stem, ((a, stem), (b, b_out), (c, c_out))),
        num_classes=num_classes,
        in_channels=in_channels,
    )
    expected = 9 * in_channels * stem + 2 * stem
    for before, mid, out, project in (
        (stem, a, stem, 0),
        (stem, b, b_out, 1),
        (b_out, c, c_out, 1),
    ):
        expected += 9 * before * mid + 2 * mid + 9 * mid * out + 2 * out
        expected += project * (before * out + 2 * out)
    assert count(model) == expected + c_out * num_classes + num_classes


@pytest.mark.slow
def test_default_widths_build_the_default_network():
    for name in ("resnet20", "resnet50"):
        stored = json.loads(json.dumps(default_widths(name)._asdict()))
        model, again = abstract(name), abstract(name, widths=Widths(**stored))
        assert nnx.graphdef(model) == nnx.graphdef(again)
        assert model.widths == default_widths(name)


def test_numpy_integers_are_widths_and_become_plain():
    widths = Widths(np.int64(4), [np.array(block).tolist() for block in THIN.blocks])
    model = abstract("resnet8", widths=widths)
    assert model.widths == THIN
    assert type(model.widths.stem) is int


# ------------------------------------------------------------------------- structure, positions


def test_paths_are_readable():
    found = paths(abstract("resnet20"))
    for path in ("stem/conv/kernel", "stem/norm/scale", "blocks/3/conv1/kernel", "head/kernel"):
        assert path in found
    assert "head/bias" in found
    assert not [path for path in found if "conv" in path and path.endswith("/bias")]
    assert len(found) == 3 + 6 * 9 + 3 * 2 + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "projected"),
    [
        ("resnet20", {3, 6}),
        ("resnet18", {2, 4, 6}),
        ("resnet50", {0, 3, 7, 13}),
    ],
)
def test_projections_follow_the_position_even_if_all_widths_are_equal(name, projected):
    default = default_widths(name)
    equal = Widths(4, tuple((4,) * len(block) for block in default.blocks))
    for widths in (default, equal):
        found = {
            path.split("/")[1]
            for path in paths(abstract(name, widths=widths))
            if "projection" in path
        }
        assert found == {str(index) for index in projected}


def equations(jaxpr):
    """All equations, those of inner jaxprs where they are called."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def convolutions(model: ResNet, images) -> list:
    """The convolutions of a forward pass, in order."""
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, images)
    return [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "conv_general_dilated"]


def sizes_and_strides(name: str) -> list[tuple[int, int]]:
    """(kernel size, stride) of each convolution."""
    convs = convolutions(abstract(name), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    return [(eqn.invars[1].aval.shape[0], eqn.params["window_strides"][0]) for eqn in convs]


@pytest.mark.slow
def test_strides_sit_in_the_3x3_of_a_bottleneck():
    block, first = [(1, 1), (3, 1), (1, 1)], [(1, 1), (3, 2), (1, 1), (1, 2)]
    expected = [(7, 2), *block, (1, 1), *block * 2]
    for depth in BOTTLENECK[1:]:
        expected += first + block * (depth - 1)
    assert sizes_and_strides("resnet50") == expected


def test_strides_sit_in_the_first_convolution_of_a_basic_block():
    block, first = [(3, 1), (3, 1)], [(3, 2), (3, 1), (1, 2)]
    assert sizes_and_strides("resnet20") == [(3, 1), *block * 3, *(first + block * 2) * 2]
    assert sizes_and_strides("resnet18") == [(7, 2), *block * 2, *(first + block) * 3]


# --------------------------------------------------------------------------- parity with NumPy


def numpy_conv(x, kernel, stride):
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            out = out + x[:, rows, columns] @ kernel[i, j]
    return out


def numpy_forward(name, variables, x, train):
    """Logits and new running statistics in float64, from the text of the paper."""
    depths, bottleneck = {
        "resnet8": ((1, 1, 1), False),
        "resnet50": (BOTTLENECK, True),
    }[name]
    variables = {path: leaf.astype(np.float64) for path, leaf in variables.items()}
    moved = {}

    def conv_norm(x, conv, norm, stride=1):
        x = numpy_conv(x, variables[f"{conv}/kernel"], stride)
        mean, var = variables[f"{norm}/mean"], variables[f"{norm}/var"]
        if train:
            batch = x.mean((0, 1, 2)), x.var((0, 1, 2))
            moved[f"{norm}/mean"] = 0.9 * mean + 0.1 * batch[0]
            moved[f"{norm}/var"] = 0.9 * var + 0.1 * batch[1]
            mean, var = batch
        scale, bias = variables[f"{norm}/scale"], variables[f"{norm}/bias"]
        return (x - mean) / np.sqrt(var + 1e-5) * scale + bias

    x = np.maximum(conv_norm(x, "stem/conv", "stem/norm", 2 if bottleneck else 1), 0)
    if bottleneck:
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # after ReLU: zeros cannot win
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        x = windows[:, ::2, ::2].max((-2, -1))
    index = 0
    for stage, depth in enumerate(depths):
        for place in range(depth):
            here = f"blocks/{index}"
            strides = (1, 1 + (stage > 0 and place == 0), 1)[0 if bottleneck else 1 :]
            y = x
            for k, stride in enumerate(strides, start=1):
                y = conv_norm(y, f"{here}/conv{k}", f"{here}/norm{k}", stride)
                y = np.maximum(y, 0) if k < len(strides) else y
            if place == 0 and (stage > 0 or bottleneck):
                shortcut = f"{here}/projection"
                x = conv_norm(x, f"{shortcut}/conv", f"{shortcut}/norm", max(strides))
            x = np.maximum(x + y, 0)
            index += 1
    return x.mean((1, 2)) @ variables["head/kernel"] + variables["head/bias"], moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "widths", "shape", "train"),
    [
        ("resnet8", THIN, (4, 9, 8, 3), False),
        ("resnet8", THIN, (4, 9, 8, 3), True),
        ("resnet50", thin_resnet50(), (2, 64, 70, 3), True),
    ],
)
def test_parity_with_numpy(name, widths, shape, train):
    graphdef, params, stats = filled(name, widths=widths)
    x = images(*shape)

    logits, new_stats = apply(graphdef, train, params, stats, x)
    variables = flat(params) | flat(stats)
    expected, moved = numpy_forward(name, variables, x, train)
    assert_close(logits, expected, 2e-4)
    assert_close(flat(new_stats), moved if train else flat(stats), 2e-4)


# ------------------------------------------------------------------------------ initial values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "widths", "identities"),
    [
        ("resnet20", Widths(4, ((3, 4),) * 9), 7),
        ("resnet50", Widths(4, ((3, 3, 4),) * 16), 12),
    ],
)
def test_blocks_without_projection_start_as_the_identity(name, widths, identities):
    model = getattr(models, name)(widths=widths, rngs=nnx.Rngs(0))
    x = jnp.abs(images(2, 4, 4, 4))
    call = nnx.jit(lambda block, x: block(x))
    same = [bool((call(block, x) == x).all()) for block in model.blocks if not block.projection]
    assert same == [True] * identities
    last = "norm3" if name == "resnet50" else "norm2"
    draws = []
    for path, leaf in flat(nnx.state(model, nnx.Param)).items():
        if path.endswith("kernel") and path != "head/kernel":
            draws.append(leaf.ravel() * math.sqrt(math.prod(leaf.shape) / leaf.shape[2] / 2))
        if path.endswith("scale"):
            assert (leaf == (0 if path.split("/")[-2] == last else 1)).all(), path
        if path.endswith("bias"):
            assert (leaf == 0).all(), path
    assert np.concatenate(draws).std() == pytest.approx(1, abs=0.1)  # He-normal over the fan-out


# ---------------------------------------------------------------- modes, compilation, precision


def test_train_mode_moves_statistics_and_eval_mode_uses_them():
    model = nnx.merge(*filled("resnet8", widths=THIN))
    call = nnx.jit(lambda model, x: model(x))
    x = images(4, 9, 8, 3)
    others = np.concatenate([x[:1], x[1:] + 1])
    start = flat(nnx.state(model, nnx.BatchStat))
    fresh = call(model, x)  # a new network trains
    moved = flat(nnx.state(model, nnx.BatchStat))
    assert all((start[path] != moved[path]).all() for path in start)
    model.eval()
    logits = call(model, x)
    assert_close(call(model, others)[0], logits[0], 1e-5)  # the rest of the batch has no influence
    assert not np.allclose(fresh, logits)
    assert_close(flat(nnx.state(model, nnx.BatchStat)), moved, 0)
    model.train()
    assert_close(call(model, x), fresh, 1e-5)


def test_two_networks_of_the_same_widths_share_one_compilation():
    traces = []

    @partial(jax.jit, static_argnums=0)
    def forward(graphdef, params, stats, x):
        traces.append(None)
        model = nnx.merge(graphdef, params, stats)
        return model(x), nnx.state(model, nnx.BatchStat)

    x = images(2, 8, 8, 3)
    graphdef, params, stats = filled("resnet8", widths=THIN)
    _, stats = forward(graphdef, params, stats, x)
    other, params, _ = filled("resnet8", widths=THIN)
    forward(other, params, stats, x)
    assert len(traces) == 1


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_computes_close_to_float32(train):
    x, results = images(4, 9, 8, 3), []
    for dtype in (jnp.float32, "bfloat16"):
        graphdef, params, stats = filled("resnet8", widths=THIN, dtype=dtype)
        logits, new_stats = apply(graphdef, train, params, stats, x)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, new_stats, logits))} == {
            np.dtype("float32")
        }
        results.append(np.asarray(logits))
    difference = np.abs(results[0] - results[1]).max()
    assert 0 < difference < 0.05 * np.abs(results[0]).max()


def test_bfloat16_convolves_in_bfloat16():
    model = abstract("resnet8", widths=THIN, dtype=jnp.bfloat16)
    convs = convolutions(model, images(2, 8, 8, 3))
    assert {v.aval.dtype for eqn in convs for v in eqn.invars + eqn.outvars} == {
        np.dtype("bfloat16")
    }


def test_bfloat16_keeps_running_statistics_exact():
    model = nnx.merge(*filled("resnet8", widths=THIN, dtype=jnp.bfloat16))
    model.eval()
    norm = model.stem.norm
    norm.mean[...] = jnp.full(4, 1001, jnp.float32)  # the nearest bfloat16 is 1000
    norm.var[...], norm.scale[...], norm.bias[...] = jnp.ones(4), jnp.ones(4), jnp.zeros(4)
    out = norm(jnp.full((1, 1, 1, 4), 1000, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), -1)


# ---------------------------------------------------------------------------- data parallelism


def loss_and_stats(graphdef, params, stats, x, labels, axis_name=None):
    """Mean cross-entropy over the whole batch, with (logits, new statistics)."""
    model = nnx.merge(graphdef, params, stats, copy=True)  # copies may change inside `jax.grad`
    logits = model(x)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()
    if axis_name is not None:
        loss = jax.lax.pmean(loss, axis_name)
    return loss, (logits, nnx.state(model, nnx.BatchStat))


def step(graphdef, axis_name=None):
    """(params, stats, x, labels) -> gradients, logits, new statistics."""

    def run(params, stats, x, labels):
        loss = partial(loss_and_stats, graphdef, axis_name=axis_name)
        grads, (logits, stats) = jax.grad(loss, has_aux=True)(params, stats, x, labels)
        return grads, logits, stats

    return run


@pytest.fixture(scope="module")
def single():
    """Inputs of a step, and its results on one device."""
    graphdef, *states = filled("resnet8", widths=THIN)
    inputs = (*states, images(16, 8, 8, 3), np.arange(16) % 10)
    return inputs, jax.jit(step(graphdef))(*inputs)


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() >= 8
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8])


@pytest.mark.slow
def test_a_sharded_batch_equals_one_device(single, mesh):
    (params, stats, x, labels), expected = single
    x, labels = jax.device_put((x, labels), NamedSharding(mesh, P("data")))
    params, stats = jax.device_put((params, stats), NamedSharding(mesh, P()))
    graphdef, *_ = filled("resnet8", widths=THIN)
    actual = jax.jit(step(graphdef))(params, stats, x, labels)
    assert len(actual[1].sharding.device_set) == 8
    assert_close(actual, expected, 1e-5)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(actual[0])) > 1e-4


def sharded_step(mesh, graphdef, axis_name):
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": (P(), P("data"), P())}
    return jax.jit(jax.shard_map(step(graphdef, axis_name), mesh=mesh, **specs))


@pytest.mark.slow
def test_shard_map_with_axis_name_equals_one_device(single, mesh):
    inputs, expected = single
    graphdef, *_ = filled("resnet8", widths=THIN, axis_name="data")
    assert_close(sharded_step(mesh, graphdef, "data")(*inputs), expected, 1e-5)


def test_shard_map_without_axis_name_is_told_apart(single, mesh):
    # Each device then has its own statistics, and JAX sees that they are not replicated.
    inputs, _ = single
    graphdef, *_ = filled("resnet8", widths=THIN)
    with pytest.raises(ValueError, match="out_specs"):
        sharded_step(mesh, graphdef, "data")(*inputs)


# ----------------------------------------------------------------------------------- bad input


def message(error, **options) -> str:
    with pytest.raises(error) as caught:
        abstract(**options)
    return str(caught.value)


def test_widths_off_the_residual_stream_are_all_named():
    blocks = list(default_widths("resnet20").blocks)
    blocks[1], blocks[4], blocks[5] = (16, 17), (32, 30), (32, 31)
    text = message(ValueError, name="resnet20", widths=Widths(16, tuple(blocks)))
    assert "`widths` does not fit resnet20" in text
    assert "blocks/1: out = 17 must be 16 as in stem" in text
    assert "blocks/4: out = 30 must be 32 as in blocks/3" in text
    assert "blocks/5: out = 31 must be 32 as in blocks/3" in text
    assert "set it to 32, or change blocks/3 and all blocks after it" in text
    assert len(text.splitlines()) == 4


def test_widths_of_the_wrong_kind_are_all_named():
    widths = Widths(0, ((3,), (5, -8), (6.0, True), 7))
    text = message(ValueError, name="resnet8", widths=widths)
    for problem in (
        "stem: 0 must be a positive integer",
        "blocks: there are 4; give 3, one per block",
        "blocks/0: (3,) must be (mid, out)",
        "blocks/1: out = -8 must be a positive integer",
        "blocks/2: mid = 6.0 must be a positive integer",
        "blocks/2: out = True must be a positive integer",
    ):
        assert problem in text


def test_basic_widths_do_not_fit_bottlenecks():
    text = message(ValueError, name="resnet50", widths=default_widths("resnet34"))
    assert text.count("must be (mid1, mid2, out)") == 16


@pytest.mark.parametrize(
    ("error", "options", "text"),
    [
        (ValueError, {"num_classes": 0}, "`num_classes` must be at least 1; got 0"),
        (ValueError, {"in_channels": -1}, "`in_channels` must be at least 1; got -1"),
        (
            TypeError,
            {"dtype": jnp.int8},
            "`dtype` must be floating, such as jnp.bfloat16; got int8",
        ),
    ],
)
def test_bad_options_are_named(error, options, text):
    assert text in message(error, name="resnet8", **options)


def test_unknown_names_list_the_known_ones():
    for build in (default_widths, partial(ResNet, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=r"`name` must be one of resnet8, .*; got 'resnet9'"):
            build("resnet9")


@pytest.mark.parametrize(
    ("error", "batch", "text"),
    [
        (ValueError, np.zeros((8, 8, 3), np.float32), r"\[B, H, W, 3\]; got shape \(8, 8, 3\)"),
        (ValueError, np.zeros((2, 3, 8, 8), np.float32), "Put the channels last"),
        (TypeError, np.zeros((2, 8, 8, 3), np.uint8), "must be floating; got uint8"),
    ],
)
def test_bad_images_are_named(error, batch, text):
    with pytest.raises(error, match=text):
        nnx.eval_shape(lambda model: model(batch), abstract("resnet8", widths=THIN))


# ------------------------------------------------------------------------------------- pruning

# Of both kinds of blocks, and stems; the others are only deeper, and take minutes to compile.
NETWORKS = ["resnet8", "resnet32", "resnet50"]


def narrow(name: str) -> Widths:
    """Streams of 8, 12, 16 and 20 channels, 4 or 8 inside of blocks: 2:4 and blocks fit them."""
    streams = sorted({block[-1] for block in default_widths(name).blocks})

    def block(index: int, width: tuple[int, ...]) -> tuple[int, ...]:
        inner = tuple(4 * (1 + (index + i) % 2) for i in range(len(width) - 1))
        return (*inner, 8 + 4 * streams.index(width[-1]))

    return Widths(8, tuple(map(block, *zip(*enumerate(default_widths(name).blocks)))))


def gate_scores(group, params, grads) -> np.ndarray:
    """|sum of w g| over the gates of each channel, in float64."""
    total = np.zeros(group.size)
    for gate in group.gates:
        path = gate.path.removeprefix("params/")
        product = np.asarray(params[path], float) * np.asarray(grads[path], float)
        rows = np.moveaxis(product, gate.dimension, 0).reshape(len(gate.channels), -1).sum(1)
        np.add.at(total, gate.channels[gate.channels >= 0], rows[gate.channels >= 0])
    return np.abs(total)


def third_by_third(path: str, leaf) -> patterns.Pattern:
    """Single weights, 2:4 and blocks of 4x4, each in a third of the leaves."""
    fits = leaf.shape[-2] % 4 == 0  # not the images
    block = patterns.blocks((None,) * (leaf.ndim - 2) + (4, 4))
    return (None, patterns.n_m(2, 4, axis=-2), block)[sum(map(ord, path)) % 3] if fits else None


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_a_step_of_every_granularity(name):
    """Weights, 2:4, blocks and channels, with a mask update in the first step."""
    graphdef, *states = filled(name, widths=narrow(name), num_classes=10)
    params, stats = map(nnx.to_pure_dict, states)
    side = 8 if name in ("resnet8", "resnet32") else 32
    x, labels = images(2, side, side, 3), np.array([3, 7])

    def train(variables, x):
        model = nnx.merge(graphdef, variables["params"], variables["stats"])
        model.train()
        logits = model(x)
        return logits, {"stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))}

    def loss(params, stats, x):
        logits = jax.nn.log_softmax(train({"params": params, "stats": stats}, x)[0])
        return -jnp.take_along_axis(logits, labels[:, None], axis=1).mean()

    trace = structure.Trace(train, (x,), lambda output: output[1])
    groups = structure.find_groups([trace], {"params": params, "stats": stats})
    # Selection is compiled for each leaf: of a deep network twelve are enough.
    few = [path for path in trees.leaf_by_path(params) if path.endswith("kernel")][:12]
    options = {
        "weights": {"pattern": third_by_third, "prunable": lambda path, leaf: path in few},
        "channels": {"groups": groups},
    }
    optimizers = {
        kind: jaxprune.chain(
            optax.sgd(0.1, momentum=0.9), jaxprune.agip_transform(0.5, start=0, stop=0, **own)
        )
        for kind, own in options.items()
    }

    @jax.jit
    def step(params, stats, states, x):
        grads, done = jax.grad(loss)(params, stats, x), {}
        for kind, optimizer in optimizers.items():
            updates, state = optimizer.update(grads, states[kind], params)
            done[kind] = optax.apply_updates(params, updates), state
        return grads, done

    states = {kind: optimizer.init(params) for kind, optimizer in optimizers.items()}
    grads, done = step(params, stats, states, x)
    for kind, (new, state) in done.items():
        masks, leaves = trees.leaf_by_path(jaxprune.get_masks(state)), trees.leaf_by_path(new)
        assert all(np.isfinite(leaf).all() for leaf in leaves.values()), kind
        masked = {path: mask for path, mask in masks.items() if jnp.ndim(mask)}
        assert all((leaves[path] == 0)[~mask].all() for path, mask in masked.items()), kind
        kept = sum(int(mask.sum()) for mask in masked.values())
        total = sum(mask.size for mask in masked.values())
        assert 0.4 * total <= kept <= 0.6 * total, kind
    (channels,) = trees.state_fields(done["channels"][1], "channels")
    flat_params, flat_grads = trees.leaf_by_path(params), trees.leaf_by_path(grads)
    assert sorted(channels) == sorted(groups) and (len(groups) > 6 or name == "resnet8")
    for group in groups.values():
        own = gate_scores(group, flat_params, flat_grads)
        on = np.asarray(channels[group.name])
        assert on.sum() == group.size - group.size // 2
        assert own[on].min() >= own[~on].max() * (1 - 1e-4), group.name
    assert list(groups) != sorted(groups), "order and sorted order must differ to be told apart"


# ------------------------------------------------------------------------- widths of parameters


def compacted(name: str, widths: Widths, side: int, seed: int):
    """A function `(variables, train, images) -> (logits, stats)`, a random plan, what it leaves."""
    graphdef, *states = filled(name, widths=widths, num_classes=10)
    variables = dict(zip(("params", "stats"), map(nnx.to_pure_dict, states)))

    def run(train, variables, x):
        model = nnx.merge(graphdef, variables["params"], variables["stats"])
        model.train() if train else model.eval()
        logits = model(x)
        return logits, {"stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))}

    x = images(4, side, side, 3)
    both = [partial(run, train) for train in (False, True)]
    traces = [structure.Trace(function, (x,), lambda output: output[1]) for function in both]
    groups = structure.find_groups(traces, variables)
    rng = np.random.default_rng(seed)
    keep = {
        name: rng.permutation(np.arange(group.size) < rng.integers(1, group.size + 1))
        for name, group in groups.items()
    }
    plan = groups.plan(keep)
    return both, plan, plan.compact(variables), x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "widths", "side", "seed"),
    [
        ("resnet8", THIN, 8, 0),
        ("resnet8", THIN, 8, 1),
        ("resnet20", Widths(6, ((5, 6),) * 3 + ((7, 8),) * 3 + ((9, 10),) * 3), 8, 1),
        ("resnet50", thin_resnet50(), 64, 0),
    ],
)
def test_a_network_of_the_compacted_widths_is_the_compacted_function(name, widths, side, seed):
    both, plan, small, x = compacted(name, widths, side, seed)
    found = models.widths_of(small["params"])
    assert found != widths
    model = ResNet(name, widths=found, num_classes=10, rngs=nnx.Rngs(1))
    # The same paths and shapes; `nnx.update` alone would take any part of them.
    ours = {path: leaf.shape for path, leaf in flat(nnx.state(model, nnx.Param)).items()}
    left = trees.leaf_by_path(small["params"])
    assert ours == {path: leaf.shape for path, leaf in left.items()}
    for part in small.values():
        nnx.update(model, part)
    for train, function in zip((False, True), both):
        graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
        logits, stats = apply(graphdef, train, *states, x)
        expected, updates = jax.jit(plan.wrap(function))(small, x)
        assert_close((logits, nnx.to_pure_dict(stats)), (expected, updates["stats"]), 1e-5)
        assert float(jnp.abs(logits).max()) > 1e-3


@pytest.mark.slow
def test_widths_of_a_network_are_those_that_it_was_built_with():
    for name in ("resnet8", "resnet56", "resnet34", "resnet50"):
        state = nnx.state(abstract(name), nnx.Param)
        assert models.widths_of(state) == default_widths(name)
        assert models.widths_of(nnx.to_pure_dict(state)) == default_widths(name)


def test_parameters_of_another_network_are_refused_by_path():
    params = nnx.to_pure_dict(nnx.state(abstract("resnet50"), nnx.Param))
    with pytest.raises(ValueError, match="  stem/conv/kernel: missing\n  blocks/0/conv1/kernel: m"):
        models.widths_of({"params": params})
    del params["blocks"][7]["conv2"], params["blocks"][11]
    params["stem"]["conv"]["kernel"] = jnp.ones((3, 4))
    with pytest.raises(ValueError) as caught:
        models.widths_of(params)
    rule, *problems = str(caught.value).splitlines()
    assert '`small["params"]`' in rule
    assert problems == [
        "  stem/conv/kernel: shape (3, 4), must be [height, width, in, out]",
        "  blocks/7/conv2/kernel: missing",
        *(f"  blocks/11/conv{i}/kernel: missing" for i in (1, 2, 3)),
    ]
