"""Copies of a kernel that an index picks, experts that rows choose, and adapters in a sum.

Each case is a model, its parameters, one batch, and the rows of inputs of each copy by NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.post_training import sparsegpt, wanda
from jaxprune.post_training._inputs import input_statistics, squared_norms
from jaxprune.post_training._matrices import to_matrices

METHODS = {"wanda": wanda, "sparsegpt": sparsegpt}
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X = draw(7, 6)
STACK = draw(3, 6, 6)
CHOICE = np.array([0, 2, 2, 0, 2, 3, 0])
CHOICES = np.stack([CHOICE, (CHOICE + 1) % 4], 1)
EXPERTS = draw(4, 6, 5)


def layers(order, kernels=STACK, x=X, act=np.tanh):
    """The rows of the copies that are applied one after the other."""
    rows = {}
    for i in order:
        rows.setdefault(i, []).append(x)
        x = act(x @ kernels[i])
    return {i: np.concatenate(own) for i, own in rows.items()}


def chosen(choice, x=X):
    return {e: x[choice == e] for e in range(len(EXPERTS))}


def static(w, x):
    for i in (0, 1, -1):
        x = jnp.tanh(x @ w[i])
    return x


def iterated(w, x):
    for own in w:
        x = jnp.tanh(x @ own)
    return x


def split(w, x):
    for own in jnp.split(w, 3):
        x = jnp.tanh(x @ own[0])
    return x


def looped(w, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)


def scanned_by_number(w, x):
    return jax.lax.scan(lambda x, i: (jnp.tanh(x @ w[2 - i]), None), x, jnp.arange(3))[0]


def in_the_middle(w, x):
    w = jnp.moveaxis(w, 0, 1)
    for i in range(3):
        x = jnp.tanh(x @ jax.lax.dynamic_index_in_dim(w, i, 1, keepdims=False))
    return x


def used_twice(w, x):
    return jnp.tanh(jnp.tanh(x @ w[1]) @ w[0]) @ w[1]


def in_jit(w, x):
    return jax.checkpoint(lambda w, x: jax.jit(static)(w, x))(w, x)


def experts(w, x):
    return jnp.einsum("tk,tkn->tn", x, w[CHOICE])


def taken(w, x):
    return jnp.einsum("tk,tkn->tn", x, jnp.take(w, CHOICE, axis=0))


OUTSIDE = np.array([1, 9, -1, 0, -7, 3, 3])  # 9 and -7 are no experts; neither is -1, if so said


def dropped(w, x):
    """Tokens that no expert takes, as capacities of experts make them."""
    picked = w.at[OUTSIDE].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    return jnp.einsum("tk,tkn->tn", x, picked)


def dropped_by_take(w, x):
    return jnp.einsum("tk,tkn->tn", x, jnp.take(w, OUTSIDE, axis=0, mode="fill", fill_value=0))


def clipped(w, x):
    return jnp.einsum("tk,tkn->tn", x, jnp.take(w, OUTSIDE, axis=0, mode="clip"))


def mapped(w, x):
    return jax.vmap(lambda row, i: row @ w[i])(x, jnp.asarray(CHOICE))


def top_two(w, x):
    return jnp.einsum("tk,tjkn->tjn", x, w[CHOICES])


def top_two_transposed(w, x):
    return jnp.einsum("tk,tjnk->tjn", x, jnp.swapaxes(w[CHOICES], 2, 3))


def one_row(w, x):
    return jnp.einsum("tk,jkn->tjn", x, w[np.array([1, 3, 1])])


def ragged(w, x):
    return jax.lax.ragged_dot(x, w, jnp.array([2, 0, 3, 1]))  # the last row has no expert


def routed(w, x):
    """The usual way to `ragged_dot`: rows sorted by their expert, and back."""
    order = jnp.argsort(jnp.asarray(CHOICE), stable=True)
    sizes = jnp.bincount(jnp.asarray(CHOICE), length=4)
    return jax.lax.ragged_dot(x[order], w, sizes)[jnp.argsort(order)]


IN_ORDER = np.array([0, 0, 2, 2, 2, 3, -1])
FORWARD, BACKWARD = layers((0, 1, 2)), layers((2, 1, 0))
TWICE = {
    0: np.tanh(X @ STACK[1]),
    1: np.concatenate([X, np.tanh(np.tanh(X @ STACK[1]) @ STACK[0])]),
    2: X[:0],
}
CASES = {
    "static": (static, STACK, FORWARD),
    "iterated": (iterated, STACK, FORWARD),
    "split": (split, STACK, FORWARD),
    "looped": (looped, STACK, FORWARD),
    "scanned by number": (scanned_by_number, STACK, BACKWARD),
    "in the middle": (in_the_middle, STACK, FORWARD),
    "used twice": (used_twice, STACK, TWICE),
    "in jit": (in_jit, STACK, FORWARD),
    "experts": (experts, EXPERTS, chosen(CHOICE)),
    "taken": (taken, EXPERTS, chosen(CHOICE)),
    "dropped": (dropped, EXPERTS, chosen(np.where(OUTSIDE == -1, 9, OUTSIDE))),
    "dropped by take": (dropped_by_take, EXPERTS, chosen(np.where(OUTSIDE == -1, 3, OUTSIDE))),
    "clipped": (clipped, EXPERTS, chosen(np.clip(OUTSIDE, 0, 3))),
    "mapped": (mapped, EXPERTS, chosen(CHOICE)),
    "top two": (
        top_two,
        EXPERTS,
        {e: X[(CHOICES == e).any(1)] for e in range(4)},
    ),
    "top two, transposed": (
        top_two_transposed,
        EXPERTS,
        {e: X[(CHOICES == e).any(1)] for e in range(4)},
    ),
    "the same rows": (one_row, EXPERTS, {0: X[:0], 1: np.concatenate([X, X]), 2: X[:0], 3: X}),
    "ragged": (ragged, EXPERTS, chosen(IN_ORDER)),
    "routed": (routed, EXPERTS, chosen(CHOICE)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_copy_has_the_inputs_of_its_own_rows(name):
    apply, w, rows = CASES[name]
    params, batches = {"w": jnp.asarray(w)}, [X, X]
    found = input_statistics(lambda p, x: apply(p["w"], x), params, batches)["w"]
    np.testing.assert_array_equal(to_matrices(w, found.arrangement), w)
    wanted = np.stack([rows[i].T @ rows[i] for i in range(len(w))])
    np.testing.assert_allclose(found.value, 2 * wanted, rtol=1e-4, atol=1e-4)
    options = {"statistic": squared_norms}
    norms = input_statistics(lambda p, x: apply(p["w"], x), params, batches, **options)["w"]
    diagonal = np.diagonal(wanted, axis1=1, axis2=2)
    np.testing.assert_allclose(norms.value, 2 * diagonal, rtol=1e-4, atol=1e-4)
    assert found.rows == norms.rows >= sum(map(len, rows.values())) * 2 // len(w)


def test_an_index_of_two_dimensions_and_scans_over_experts():
    w, x = draw(2, 4, 6, 6), X
    by_layer = [CHOICE, (CHOICE + 1) % 4]

    def unrolled(w, x):
        for layer, choice in enumerate(by_layer):
            x = jnp.tanh(jnp.einsum("tk,tkn->tn", x, w[layer, choice]))
        return x

    def one_after_the_other(w, x):
        for layer, choice in enumerate(by_layer):
            x = jnp.tanh(jnp.einsum("tk,tkn->tn", x, w[layer][choice]))
        return x

    def scanned(w, x):
        def layer(x, own):
            w, choice = own
            return jnp.tanh(jnp.einsum("tk,tkn->tn", x, w[choice])), None

        return jax.lax.scan(layer, x, (w, jnp.stack(by_layer)))[0]

    wanted, h = np.zeros((8, 6, 6)), x
    for layer, choice in enumerate(by_layer):
        for e in range(4):
            wanted[4 * layer + e] = h[choice == e].T @ h[choice == e]
        h = np.tanh(np.einsum("tk,tkn->tn", h, w[layer, choice]))
    for apply in (unrolled, one_after_the_other, scanned):
        call = lambda p, x, apply=apply: apply(p["w"], x)  # noqa: E731
        found = input_statistics(call, {"w": jnp.asarray(w)}, [x])["w"]
        np.testing.assert_array_equal(to_matrices(w, found.arrangement), w.reshape(8, 6, 6))
        np.testing.assert_allclose(found.value, wanted, rtol=1e-3, atol=1e-4)
    corner = lambda p, x: x @ p["w"][1, 2]  # noqa: E731
    found = input_statistics(corner, {"w": jnp.asarray(w)}, [x])["w"]
    assert [i for i in range(8) if np.any(found.value[i])] == [6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["static", "looped", "experts", "ragged"])
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"n_m": (1, 2)}])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.filterwarnings("ignore:`batches` has no input")
def test_a_copy_is_pruned_like_a_kernel_of_its_own(name, amount, method):
    apply, w, rows = CASES[name]
    pruned, masks = method(lambda p, x: apply(p["w"], x), {"w": jnp.asarray(w)}, [X], **amount)
    for i, own in rows.items():
        if not len(own):
            continue
        alone, wanted = method(lambda p, x: x @ p["w"], {"w": jnp.asarray(w[i])}, [own], **amount)
        np.testing.assert_array_equal(masks["w"][i], wanted["w"])
        np.testing.assert_allclose(pruned["w"][i], alone["w"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_an_expert_without_rows_is_pruned_by_magnitude_and_named(method):
    call = lambda p, x: experts(p["w"], x)  # noqa: E731
    with pytest.warns(UserWarning, match=r"pruned by magnitude.*\n  w\[1\]$"):
        pruned, masks = method(call, {"w": jnp.asarray(EXPERTS)}, [X], 0.5)
    idle, own = np.abs(EXPERTS[1]), np.asarray(masks["w"][1])
    assert own.sum() == 15
    np.testing.assert_array_equal(pruned["w"][1], np.where(own, EXPERTS[1], 0))
    if method is wanda:
        assert all(idle[own[:, j], j].min() > idle[~own[:, j], j].max() for j in range(5))
    else:
        assert idle[own].min() > idle[~own].max()


# ---- adapters


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_kernel_with_a_merged_adapter_sees_the_same_inputs(method):
    params = {"w": draw(3, 6, 6), "a": draw(3, 6, 2), "b": draw(3, 2, 6)}
    params = jax.tree.map(jnp.asarray, params)

    def merged(p, x):
        for i in range(3):
            x = jnp.tanh(x @ (p["w"][i] + 0.5 * (p["a"][i] @ p["b"][i])))
        return x

    def beside(p, x):
        def layer(x, own):
            return jnp.tanh(x @ own["w"] + 0.5 * (x @ own["a"] @ own["b"])), None

        return jax.lax.scan(layer, x, p)[0]

    ours, masks = method(merged, params, [X], 0.5, prunable="w")
    wanted, same = method(beside, params, [X], 0.5, prunable="w")
    np.testing.assert_array_equal(masks["w"], same["w"])
    np.testing.assert_allclose(ours["w"], wanted["w"], rtol=1e-3, atol=1e-3)
    for name in "ab":
        np.testing.assert_array_equal(ours[name], params[name])
    with pytest.raises(ValueError, match="a: multiplied by another leaf"):
        method(merged, params, [X], 0.5)


def test_a_difference_is_a_sum():
    base = functools.partial(lambda sign, p, x: x @ (sign * draw(6, 6) - p["w"]), 1.0)
    found = input_statistics(base, {"w": jnp.asarray(draw(6, 6))}, [X])["w"]
    np.testing.assert_allclose(found.value[0], X.T @ X, rtol=1e-4, atol=1e-4)
