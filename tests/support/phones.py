"""Small networks for export, each with one property that a runtime may not like."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXPLICIT = ((1, 1), (1, 1))
FORM = ("NHWC", "HWIO", "NHWC")


def images(batch=1, size=16, channels=3, seed=0):
    """Random images, float32 [batch, size, size, channels]."""
    shape = (batch, size, size, channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def weights(channels=3, width=8, classes=5, sparsity=0.9, head_sparsity=0.0, seed=0):
    """Weights of `apply`; the 1x1 filters have exactly the sparsity."""
    draw = np.random.default_rng(seed)

    def filters(*shape, zeros=0.0):
        values = draw.normal(size=shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))
        order = np.argsort(np.abs(values), axis=None)[: round(zeros * values.size)]
        values.reshape(-1)[order] = 0
        return jnp.asarray(values)

    wide = 4 * width
    return {
        "stem": filters(3, 3, channels, width),
        "first": filters(1, 1, width, wide, zeros=sparsity),
        "depthwise": filters(3, 3, 1, wide),
        "second": filters(1, 1, wide, wide, zeros=sparsity),
        "middle": filters(3, 3, wide, wide, zeros=sparsity),
        "squeeze": filters(1, 1, wide, width, zeros=sparsity),
        "excite": filters(1, 1, width, wide, zeros=sparsity),
        "bias": jnp.asarray(draw.normal(size=wide).astype(np.float32)),
        "head": filters(wide, classes, zeros=head_sparsity),
    }


def conv(x, kernel, stride=1, padding="SAME", groups=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=FORM,
        feature_group_count=groups,
    )


def network(
    *,
    stem_stride=2,
    stem_padding=EXPLICIT,
    stride=2,
    padding=EXPLICIT,
    dilation=1,
    middle=None,
    activation=jax.nn.relu6,
    outputs=lambda features, logits: logits,
):
    """Returns `apply` of a network like MobileNet V1, with one residual sum."""

    def apply(w, x):
        x = activation(conv(x, w["stem"], stem_stride, stem_padding))
        x = activation(conv(x, w["first"]))
        wide = x.shape[-1]
        x = conv(x, w["depthwise"], stride, padding, wide, dilation) + w["bias"].reshape(
            1, 1, 1, -1
        )
        x = activation(x)
        if middle is not None:
            x = middle(w, x)
        x = x + activation(conv(x, w["second"]))
        return outputs(x, jnp.mean(x, axis=(1, 2)) @ w["head"])

    return apply


def squeeze_and_excite(w, x):
    gate = jnp.mean(x, axis=(1, 2), keepdims=True)
    gate = jax.nn.sigmoid(conv(jax.nn.relu(conv(gate, w["squeeze"])), w["excite"]))
    return x * gate


def max_pool(w, x):
    del w
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
