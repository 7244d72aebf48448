"""Sizes that are symbols: a wrapped function is exported once for all batches and lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxprune import jaxprs, structure
from tests.support.checks import draw

WEIGHTS = {
    **{"a": draw(6, 16), "bias": draw(16), "b": draw(16, 6), "qkv": draw(6, 48)},
    **{"conv": draw(3, 3, 6, 16), "places": draw(32, 6)},
}


def mlp(w, x):
    return jax.nn.relu(x @ w["a"] + w["bias"].reshape((1,) * (x.ndim - 1) + (16,))) @ w["b"]


def attend(w, x):
    batch, length, _ = x.shape
    q, k, v = jnp.moveaxis((x @ w["qkv"]).reshape(batch, length, 3, 4, 4), 2, 0)
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
    share = jax.nn.softmax(jnp.where(seen, scores, -1e9), -1)
    return jnp.einsum("bhts,bshd->bthd", share, v).reshape(batch, length, 16) @ w["b"]


def convolve(w, x):
    form = ("NHWC", "HWIO", "NHWC")
    x = lax.conv_general_dilated(x, w["conv"], (2, 2), "SAME", dimension_numbers=form)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jax.nn.relu(x).mean((1, 2)) @ w["b"]


def dropped(w, x):
    hidden = x @ w["a"]
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, hidden.shape), hidden, 0) @ w["b"]


def mixed(w, x):
    """The rows lie among columns: the size of the whole is no number, so its width must stay."""
    hidden = (x @ w["a"]).reshape(16, -1)
    return (jnp.sin(hidden).reshape(-1, 16) + 0 * (x @ w["a"])) @ w["b"]


CASES = {
    "rows": (mlp, "b, 6", 16),
    "rows and columns": (lambda w, x: mlp(w, x.reshape(-1, 6)).reshape(x.shape), "b, t, 6", 16),
    "statistics of the rows": (lambda w, x: mlp(w, x - x.mean(0, keepdims=True)), "b, 6", 16),
    "attention": (attend, "b, t, 6", 4),
    "images": (convolve, "b, 4*h, 4*w, 6", 16),
    "a table of places": (lambda w, x: mlp(w, x + w["places"][None, : x.shape[1]]), "b, t, 6", 16),
    "twice the rows": (lambda w, x: mlp(w, jnp.concatenate([x, -x]))[::2], "b, 6", 16),
    "padding": (lambda w, x: mlp(w, jnp.pad(x, ((1, 2), (0, 0)))), "b, 6", 16),
    "as much padding as rows": (
        lambda w, x: jnp.pad(x @ w["a"], ((0, x.shape[0]), (0, 0))) @ w["b"],
        "b, 6",
        16,
    ),
    "numbers of rows": (lambda w, x: mlp(w, x * jnp.arange(x.shape[0])[:, None]), "b, 6", 16),
    "sorted rows": (lambda w, x: jnp.sort(x @ w["a"], 0) @ w["b"], "b, 6", 16),
    "dropout": (dropped, "b, 6", 16),
    "scan": (lambda w, x: lax.scan(lambda c, _: (mlp(w, c), None), x, None, 3)[0], "b, 6", 16),
    "map over rows": (lambda w, x: lax.map(lambda row: mlp(w, row[None])[0], x), "b, 6", 16),
    "a dimension like the number of rows": (mixed, "b, 6", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_export_with_symbolic_sizes(name):
    function, form, width = CASES[name]
    weights = jax.tree.map(lambda leaf: 0.3 * leaf, WEIGHTS)
    bounds = ("t<=32",) if "t" in form else ()
    shape = jax.ShapeDtypeStruct(export.symbolic_shape(form, constraints=bounds), jnp.float32)
    groups = structure.find_groups(function, weights, shape)
    sizes = [group.size for group in groups.values() if "b" in {m.path for m in group.members}]
    assert sizes == ([width] if width else [])
    plan = groups.plan(
        {name: np.arange(group.size) % 4 < 2 for name, group in groups.items()}, multiple=1
    )
    small = plan.compact(weights)
    exported = export.export(jax.jit(plan.wrap(function)))(small, shape)
    for numbers in ({"b": 5, "t": 7, "h": 2, "w": 3}, {"b": 17, "t": 19, "h": 3, "w": 2}):
        sides = [int(eval(side, numbers)) for side in form.split(",")]
        x = draw(*sides)
        wanted = function(plan.mask(weights), x)
        np.testing.assert_allclose(exported.call(small, x), wanted, atol=1e-4)


def test_a_plan_of_symbolic_sizes_is_that_of_numbers():
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, t, 6"), jnp.float32)
    groups = structure.find_groups(attend, WEIGHTS, shape)
    numbers = structure.find_groups(attend, WEIGHTS, draw(2, 7, 6))
    assert list(groups) == list(numbers)
    plan = groups.plan({"qkv:1": np.arange(4) < 2}, multiple=1)
    assert plan.to_dict() == numbers.plan({"qkv:1": np.arange(4) < 2}, multiple=1).to_dict()
    assert plan.verify(attend, WEIGHTS, draw(2, 7, 6)) < 1e-5
    kept = plan.kept_outputs(attend, WEIGHTS, shape)
    assert [own.tolist() for own in kept[:2]] == [[True], [True]] and kept[2].all()
    assert not plan.fits(attend, WEIGHTS, shape)  # it names the width


def test_variables_of_symbolic_size():
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("n, 6"), jnp.float32)
    weights = WEIGHTS | {"places": shape}
    with pytest.raises(ValueError, match=r"known sizes.*\n  places: \(n, 6\)"):
        structure.find_groups(mlp, weights, draw(5, 6))


def test_numbers_stand_in_for_sizes():
    b, t, sides = export.symbolic_shape("b, t, 2*b*t + 1")
    numbers = jaxprs.sizes((b, t, sides))
    assert numbers[2] == 2 * numbers[0] * numbers[1] + 1 and numbers[0] != numbers[1]
    assert jaxprs.sizes(((1, b), "b", None)) == ((1, numbers[0]), "b", None)
    assert jaxprs.sizes(3 - b) == 2  # at least


def test_a_size_that_equals_the_number_of_a_symbol():
    """Taken for equal, the symbol and the size would leave the width between them where it is."""
    number = jaxprs.sizes(export.symbolic_shape("b"))[0]

    def function(w, x):
        hidden = jnp.einsum("btc,ch->bht", x, w["a"])  # [b, 16, number]
        mixed = hidden.reshape(number, 16, -1)
        return jnp.einsum("nhb,hc->nbc", mixed, w["b"])

    shape = jax.ShapeDtypeStruct(export.symbolic_shape(f"b, {number}, 6"), jnp.float32)
    groups = structure.find_groups(function, WEIGHTS, shape)
    assert not groups
    (reason,) = [f.reason for f in groups.frozen if (f.path, f.dimension) == ("a", 1)]
    assert "`reshape`" in reason


def test_a_width_that_is_merged_with_rows_stays():
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 6"), jnp.float32)
    groups = structure.find_groups(lambda w, x: (x @ w["a"]).reshape(-1), WEIGHTS, shape)
    assert not groups
    (reason,) = [f.reason for f in groups.frozen if (f.path, f.dimension) == ("a", 1)]
    assert reason.startswith("its size is symbolic at ")
