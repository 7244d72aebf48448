"""A small elastic network that is a plain function, and images for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, elastic, structure

MEAN_DECAY = 0.9
BLOCKS = 2


def conv(x, kernel, groups=1):
    """A convolution that pads by the size of its window."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def norm(own, state, x, train):
    """Batch normalisation; returns the result and the new statistics."""
    mean, var = state["mean"], state["var"]
    new = state
    if train:
        mean = x.mean((0, 1, 2))
        var = ((x - mean[None, None, None]) ** 2).mean((0, 1, 2))
        pairs = {"mean": mean, "var": var}
        new = {k: MEAN_DECAY * state[k] + (1 - MEAN_DECAY) * pairs[k] for k in pairs}
    scale = own["scale"] * jax.lax.rsqrt(var + 1e-5)
    spread = (None, None, None)
    return (x - mean[spread]) * scale[spread] + own["bias"][spread], new


def network(variables, x, *, train=False):
    """A stem, two inverted residuals that may be skipped, a classifier.

    It takes its widths and windows from the arrays, and leaves out blocks that are None.
    """
    own, state, new = variables["params"], variables["state"], {}
    x = conv(x, own["stem"]["kernel"])
    x, new["stem"] = norm(own["stem"], state["stem"], x, train)
    x = jax.nn.relu(x)
    for name in (f"block{number}" for number in range(BLOCKS)):
        if own[name]["up"]["kernel"] is None:
            continue
        y, new[name] = x, {}
        for layer in ("up", "deep", "down"):
            kernel = own[name][layer]["kernel"]
            y = conv(y, kernel, kernel.shape[-1] if layer == "deep" else 1)
            y, new[name][layer] = norm(own[name][layer], state[name][layer], y, train)
            y = y if layer == "down" else jax.nn.relu(y)
        x = x + y
    logits = x.mean((1, 2)) @ own["head"]
    return (logits, {"state": new}) if train else logits


evaluate = functools.partial(network, train=False)
train = functools.partial(network, train=True)


def new_variables(seed=0, stream=4, hidden=6, window=5, classes=3, channels=1):
    """Random variables whose statistics are not those of any data."""
    rng = np.random.default_rng(seed)

    def normed(shape):
        width = shape[-1]
        fan = np.prod(shape[:-1])
        kernel = rng.normal(size=shape) / np.sqrt(fan)
        scale, bias = rng.uniform(0.5, 1.5, width), 0.1 * rng.normal(size=width)
        own = {"kernel": kernel, "scale": scale, "bias": bias}
        state = {"mean": 0.1 * rng.normal(size=width), "var": rng.uniform(0.5, 1.5, width)}
        return own, state

    params, state = {}, {}
    params["stem"], state["stem"] = normed((3, 3, channels, stream))
    for number in range(BLOCKS):
        shapes = {
            "up": (1, 1, stream, hidden),
            "deep": (window, window, 1, hidden),
            "down": (1, 1, hidden, stream),
        }
        pairs = {layer: normed(shape) for layer, shape in shapes.items()}
        params[f"block{number}"] = {layer: own for layer, (own, _) in pairs.items()}
        state[f"block{number}"] = {layer: own for layer, (_, own) in pairs.items()}
    params["head"] = rng.normal(size=(stream, classes))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"params": params, "state": state})


@functools.cache
def groups_of(size=6):
    """The groups of the network, in evaluation and in training."""
    x = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    traces = [
        structure.Trace(evaluate, (x,)),
        structure.Trace(train, (x,), lambda output: output[1]),
    ]
    return structure.find_groups(
        traces, new_variables(), parameters=lambda path, leaf: path.startswith("params/")
    )


def make_space(*, seed=0, resolutions=(), train=train, evaluate=evaluate, kernels=True):
    """Widths of both blocks and of the stream, both blocks, windows of 3 and 5."""
    groups = groups_of()
    blocks = [f"params/block{number}/" for number in range(BLOCKS)]

    def group_of(path, dimension):
        return next(
            name
            for name, group in groups.items()
            if any((own.path, own.dimension) == (path, dimension) for own in group.members)
        )

    return elastic.make_space(
        groups,
        new_variables(seed),
        evaluate,
        train,
        widths={
            **{group_of(f"{own}up/kernel", 3): (1, 2, 4, 6) for own in blocks},
            group_of("params/stem/kernel", 3): (2, 3, 4),
        },
        depths={
            "body": [next(name for name in groups.blocks if name.startswith(own)) for own in blocks]
        },
        kernels={f"{own}deep/kernel": (3, 5) for own in blocks} if kernels else None,
        resolutions=resolutions,
    )


@functools.cache
def images(size=6, count=64):
    """Images whose class is their brightness."""
    rng = np.random.default_rng(0)

    def split(number):
        labels = rng.integers(0, 3, number).astype(np.int32)
        noise = rng.integers(0, 100, (number, size, size, 1))
        own = (noise + 70 * labels[:, None, None, None]).astype(np.uint8)
        return data.Split(own, labels)

    return data.make_dataset("brightness", split(count), split(count), 3)
