"""Reasons name the user's own line, and finding groups costs little more than tracing."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from jax import lax

from jaxprune import jaxprs, structure
from tests.support.checks import draw
from tests.support.effort import calls

X = draw(4, 3)
WEIGHTS = {"a": draw(3, 16), "b": draw(16, 2)}

# Functions of `jax.numpy` are compiled, and what is inside of them knows no line of the user's.
ALONG = {
    "sort": lambda h: jnp.sort(h, 1),
    "argsort": lambda h: h * jnp.argsort(h, 1),
    "cumsum": lambda h: jnp.cumsum(h, 1),
    "fft": lambda h: jnp.fft.fft(h).real,
    "take": lambda h: jnp.take(h, jnp.argsort(h[0]), axis=1),
    "argmax": lambda h: h * jnp.argmax(h, 1, keepdims=True),
    "compiled twice": lambda h: jax.jit(lambda h: jnp.median(h, 1, keepdims=True))(h) + h,
}


def line_of(function):
    return f"{__file__}:{inspect.getsourcelines(function)[1]} "


@pytest.mark.parametrize("name", ALONG)
def test_reasons_inside_of_compiled_functions_name_the_call(name):
    operation = ALONG[name]
    for _ in range(2):  # the second time JAX has the traces of its functions already
        groups = structure.find_groups(lambda w, x: operation(x @ w["a"]) @ w["b"], WEIGHTS, X)
        (reason,) = [f.reason for f in groups.frozen if (f.path, f.dimension) == ("a", 1)]
        assert line_of(operation) in reason + " ", reason


def test_reasons_name_the_model_and_not_the_layers_of_a_library():
    class Linen(linen.Module):
        """A sort between two layers."""

        @linen.compact
        def __call__(self, x):
            hidden = linen.Dense(16)(x)
            return linen.Dense(3)(jnp.sort(hidden, 1))

    class Nnx(nnx.Module):
        """The same."""

        def __init__(self):
            self.first = nnx.Linear(3, 16, rngs=nnx.Rngs(0))
            self.last = nnx.Linear(16, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.last(jnp.sort(self.first(x), 1))

    model = Linen()
    variables = model.init(jax.random.key(0), X)
    first = inspect.getsourcelines(Linen.__call__)[1]
    reasons = reasons_of(structure.find_groups(model.apply, variables, X))
    assert f"{__file__}:{first + 2} (" in reasons["params/Dense_0/kernel", 0]
    assert f"{__file__}:{first + 3} (" in reasons["params/Dense_0/kernel", 1]
    assert reasons["params/Dense_0/kernel", 1].startswith("`sort` along it at ")
    reasons = reasons_of(structure.find_groups(lambda m, x: m(x), Nnx(), X))
    place = f"{__file__}:{inspect.getsourcelines(Nnx.__call__)[1] + 1} ("
    assert all(place in reasons["first/kernel", dimension] for dimension in (0, 1))
    # Where no line is the user's, that of the library is better than none.
    alone = linen.Dense(16)
    groups = structure.find_groups(alone.apply, alone.init(jax.random.key(0), X), X)
    assert "flax" in reasons_of(groups)["params/kernel", 0]


def reasons_of(groups):
    return {(f.path, f.dimension): f.reason for f in groups.frozen}


def test_lines_of_code_that_has_no_file():
    scope = {}
    exec("def made(x):\n    return -x\n", {}, scope)
    (equation,) = jax.make_jaxpr(lambda x: scope["made"](x))(1.0).eqns
    assert jaxprs.line(equation).startswith(f"{__file__}:")


# ---- cost

LAYERS, DIMENSION, HEADS, HIDDEN, WORDS = 24, 3072, 24, 8192, 32000


def half(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def transformer(weights, tokens):
    def normed(x, scale):
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None, None]

    x = weights["words"][tokens]
    for layer in weights["layers"]:
        hidden = normed(x, layer["norms"][0])
        q, k, v = (jnp.einsum("btd,dhk->bthk", hidden, layer[name]) for name in "qkv")
        share = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        x = x + jnp.einsum("bhts,bshk,hkd->btd", share, v, layer["out"])
        hidden = normed(x, layer["norms"][1])
        x = x + (jax.nn.silu(hidden @ layer["gate"]) * (hidden @ layer["up"])) @ layer["down"]
    return x @ weights["head"]


@pytest.mark.slow
def test_finding_groups_of_billions_of_parameters_takes_a_few_times_their_tracing():
    width = DIMENSION // HEADS
    layer = {name: half(DIMENSION, HEADS, width) for name in "qkv"}
    layer |= {"out": half(HEADS, width, DIMENSION), "norms": [half(DIMENSION)] * 2}
    layer |= {"gate": half(DIMENSION, HIDDEN), "up": half(DIMENSION, HIDDEN)}
    layer |= {"down": half(HIDDEN, DIMENSION)}
    weights = {"words": half(WORDS, DIMENSION), "layers": [layer] * LAYERS}
    weights |= {"head": half(DIMENSION, WORDS)}
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def trace():
        jax.clear_caches()
        return jax.make_jaxpr(lambda *args: transformer(*args))(weights, tokens)

    def find():
        jax.clear_caches()
        return structure.find_groups(transformer, weights, tokens)

    assert calls(find) < 4 * calls(trace)  # 2.8; it was more than 13 when shapes were traced again
