"""Inputs are found in any jaxpr; Wanda and SparseGPT follow their papers with exact counts."""

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune
from jaxprune import models
from jaxprune.post_training import _sparsegpt as sparsegpt_module
from jaxprune.post_training import (
    from_matrices,
    gram,
    input_statistics,
    sparsegpt,
    squared_norms,
    to_matrices,
    wanda,
)
from tests.support import reference

NHWC = ("NHWC", "HWIO", "NHWC")


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _linear(params, x):
    return x @ params["kernel"]


def _correlated(seed, rows, features):
    """Inputs with a few strong common factors, and features of very different norms."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(rows, 3)) @ rng.normal(size=(3, features))
    scales = np.exp(rng.normal(size=features))
    return ((factors + 0.5 * rng.normal(size=(rows, features))) * scales).astype(np.float32)


# --- statistics of the inputs


def test_statistics_are_those_of_the_layer_inputs_in_order_of_use():
    first, second = _normal(0, 4, 3), _normal(1, 3, 5)
    params = {"a_last": jnp.asarray(second), "bias": jnp.ones(3), "z_first": jnp.asarray(first)}

    def apply(params, x):
        return jax.nn.relu(x @ params["z_first"] + params["bias"][None]) @ params["a_last"]

    x = _normal(2, 7, 4)
    found = input_statistics(apply, params, [x])
    assert list(found) == ["z_first", "a_last"]
    hidden = np.maximum(x @ first + 1, 0)
    for path, rows, end in [("z_first", x, (1, 4, 3)), ("a_last", hidden, (1, 3, 5))]:
        np.testing.assert_allclose(found[path].value[0], rows.T @ rows, rtol=1e-5)
        assert found[path].rows == 7
        assert found[path].arrangement.end == end
        assert found[path].value.dtype == jnp.float32


def test_batches_of_any_sizes_add_up_to_one_large_batch():
    params, x = {"kernel": jnp.asarray(_normal(0, 6, 3))}, _normal(1, 10, 6)
    whole = input_statistics(_linear, params, [x])["kernel"]
    parts = input_statistics(_linear, params, iter([x[:4], x[4:8], x[8:]]))["kernel"]
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
    assert parts.rows == whole.rows == 10


def test_squared_norms_are_the_diagonal_of_the_gram_matrix():
    params, x = {"kernel": jnp.ones((6, 3))}, _normal(1, 10, 6)
    norms = input_statistics(_linear, params, [x], statistic=squared_norms)["kernel"].value
    full = input_statistics(_linear, params, [x], statistic=gram)["kernel"].value
    np.testing.assert_allclose(norms[0], np.diagonal(full[0]), rtol=1e-5)


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [
        ((1, 1), "SAME", (1, 1)),
        ((2, 2), "SAME", (1, 1)),
        ((2, 1), "VALID", (1, 1)),
        ((1, 2), ((2, 1), (0, 3)), (2, 1)),
        ((2, 2), "VALID", (1, 3)),
    ],
)
def test_convolution_inputs_are_the_explicit_patches(strides, padding, dilation):
    kernel, image = _normal(0, 3, 2, 3, 4), _normal(1, 2, 9, 8, 3)

    def apply(params, x):
        return jax.lax.conv_general_dilated(
            x, params["k"], strides, padding, rhs_dilation=dilation, dimension_numbers=NHWC
        )

    found = input_statistics(apply, {"k": jnp.asarray(kernel)}, [image])["k"]
    if isinstance(padding, str):
        spans = [(w - 1) * d + 1 for w, d in zip((3, 2), dilation)]
        padding = jax.lax.padtype_to_pads((9, 8), spans, strides, padding)
    rows = reference.conv_patches(image, (3, 2), strides, padding, dilation)
    np.testing.assert_allclose(found.value[0], rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert found.rows == len(rows)
    # Features are in the order of the rows of this matrix, and of the patches.
    np.testing.assert_array_equal(to_matrices(kernel, found.arrangement)[0], kernel.reshape(18, 4))
    outputs = np.asarray(apply({"k": kernel}, image)).reshape(-1, 4)
    np.testing.assert_allclose(outputs, rows @ kernel.reshape(18, 4), rtol=1e-4, atol=1e-4)


def _conv(x, k, *args, **options):
    return jax.lax.conv_general_dilated(x, k, *args, **options)


@jax.custom_jvp
def _custom_jvp(x, w):
    return x @ w


@jax.custom_vjp
def _custom_vjp(x, w):
    return x @ w


_custom_jvp.defjvp(lambda primals, tangents: (_custom_jvp(*primals), tangents[0] @ primals[1]))
_custom_vjp.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))

X, IMAGE = _normal(5, 6, 4), _normal(6, 2, 5, 6, 4)
# name -> (kernel shape, function of kernel and input, input, (groups, features, outputs)). Groups
# and outputs come last in what the function returns.
USES = {
    "x @ w": ((4, 3), lambda w, x: x @ w, X, (1, 4, 3)),
    "w @ x": ((3, 4), lambda w, x: (w @ x.T).T, X, (1, 4, 3)),
    "x @ w.T": ((3, 4), lambda w, x: x @ w.T, X, (1, 4, 3)),
    "cast": ((4, 3), lambda w, x: x @ w.astype(jnp.float16).astype(jnp.float32), X, (1, 4, 3)),
    "transposing reshape": (
        (2, 3, 2),
        lambda w, x: x @ jax.lax.reshape(w, (4, 3), (0, 2, 1)),
        X,
        (1, 4, 3),
    ),
    "reshaped": ((2, 2, 3), lambda w, x: x @ w.reshape(4, 3), X, (1, 4, 3)),
    "new axes": ((4, 3), lambda w, x: x @ jnp.squeeze(w[None, :, None], (0, 2)), X, (1, 4, 3)),
    "vector": ((4,), lambda w, x: (x @ w)[:, None], X, (1, 4, 1)),
    "vmap": ((3, 4), lambda w, x: jax.vmap(lambda row: w @ row)(x), X, (1, 4, 3)),
    "two features axes": (
        (3, 5, 6, 4),
        lambda w, x: jnp.einsum("nhwc,ochw->no", x, jnp.transpose(w, (0, 3, 1, 2))),
        IMAGE,
        (1, 120, 3),
    ),
    "heads": (
        (4, 2, 3),
        lambda w, x: jnp.einsum("nd,dhk->nhk", x, w).reshape(-1, 6),
        X,
        (1, 4, 6),
    ),
    "experts": (
        (4, 6, 3),
        lambda w, x: jnp.einsum("nhwc,cwo->nhco", x, w).reshape(-1, 12),
        IMAGE,
        (4, 6, 3),
    ),
    "jit": ((4, 3), lambda w, x: jax.jit(lambda a, b: b @ a)(w, x), X, (1, 4, 3)),
    "jit of a view": ((3, 4), lambda w, x: x @ jax.jit(jnp.transpose)(w), X, (1, 4, 3)),
    "remat": ((4, 3), lambda w, x: jax.checkpoint(lambda a, b: b @ a)(w, x), X, (1, 4, 3)),
    "custom_jvp": ((4, 3), lambda w, x: _custom_jvp(x, w), X, (1, 4, 3)),
    "custom_vjp": ((4, 3), lambda w, x: _custom_vjp(x, w), X, (1, 4, 3)),
    "conv": (
        (3, 3, 4, 2),
        lambda w, x: _conv(x, w, (1, 2), "SAME", dimension_numbers=NHWC),
        IMAGE,
        (1, 36, 2),
    ),
    "conv OIHW": (
        (2, 4, 3, 3),
        lambda w, x: jnp.moveaxis(_conv(jnp.moveaxis(x, -1, 1), w, (1, 1), "SAME"), 1, -1),
        IMAGE,
        (1, 36, 2),
    ),
    "conv in groups": (
        (3, 1, 2, 6),
        lambda w, x: _conv(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=2),
        IMAGE,
        (2, 6, 3),
    ),
    "depthwise": (
        (3, 3, 1, 4),
        lambda w, x: _conv(x, w, (1, 1), "VALID", dimension_numbers=NHWC, feature_group_count=4),
        IMAGE,
        (4, 9, 1),
    ),
    "transposed conv": (
        (3, 2, 4, 2),
        lambda w, x: _conv(
            x, w, (1, 1), ((1, 2), (-1, 1)), lhs_dilation=(2, 3), dimension_numbers=NHWC
        ),
        IMAGE,
        (1, 24, 2),
    ),
    "1-d conv": (
        (3, 4, 2),
        lambda w, x: _conv(x[:, 0], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        IMAGE,
        (1, 12, 2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", USES)
def test_every_kind_of_product_has_the_energy_of_its_output(name):
    # `||X w_i||^2 = w_i^T X^T X w_i`: layout and Gram matrix must belong together.
    shape, use, x, end = USES[name]
    kernel = _normal(7, *shape).astype(np.float16).astype(np.float32)
    rule = {"w": True}
    found = input_statistics(lambda p, x: use(p["w"], x), {"w": kernel}, [x], prunable=rule)["w"]
    assert found.arrangement.end == end
    matrices = to_matrices(kernel, found.arrangement)
    energy = np.einsum("gfo,gfh,gho->go", matrices, found.value, matrices)
    output = np.asarray(use(jnp.asarray(kernel), x)).reshape(-1, end[0] * end[2])
    np.testing.assert_allclose(energy.reshape(-1), (output**2).sum(axis=0), rtol=2e-3)
    np.testing.assert_array_equal(from_matrices(matrices, found.arrangement), kernel)
    assert found.rows == len(output)


def test_output_channels_come_in_the_order_of_height_width_input_for_every_layout():
    kernel = _normal(0, 3, 2, 4, 5)

    def layout_of(shape, specification):
        def apply(params, x):
            return _conv(
                x, params, (1, 1), "SAME", dimension_numbers=("NHWC", specification, "NHWC")
            )

        return input_statistics(apply, jnp.zeros(shape), [IMAGE])[""].arrangement

    for order, specification in [((3, 2, 0, 1), "OIHW"), ((2, 3, 0, 1), "IOHW")]:
        moved = kernel.transpose(order)
        matrix = to_matrices(moved, layout_of(moved.shape, specification))[0]
        np.testing.assert_array_equal(matrix, kernel.reshape(24, 5))


@pytest.mark.slow
@hypothesis.given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.integers(-1, 2)] * 4),
)
@hypothesis.settings(max_examples=15)
def test_any_convolution_has_the_energy_of_its_output(strides, dilation, spread, pads):
    kernel, image = _normal(0, 2, 2, 2, 3), _normal(1, 1, 6, 7, 2)

    def use(params, x):
        return _conv(
            x,
            params,
            strides,
            (pads[:2], pads[2:]),
            lhs_dilation=spread,
            rhs_dilation=dilation,
            dimension_numbers=NHWC,
        )

    output = np.asarray(use(kernel, image)).reshape(-1, 3)
    found = input_statistics(use, jnp.asarray(kernel), [image])[""]
    matrix = kernel.reshape(8, 3)
    energy = np.einsum("fo,fh,ho->o", matrix, found.value[0], matrix)
    np.testing.assert_allclose(energy, (output**2).sum(axis=0), rtol=1e-4, atol=1e-4)
    assert found.rows == len(output)


def test_tied_weights_add_up_their_uses():
    x = _normal(0, 5, 4)

    def apply(params, x):
        hidden = jnp.tanh(x @ params["w"])
        return params["w"].T @ hidden.T

    w = _normal(1, 4, 4)
    found = input_statistics(apply, {"w": jnp.asarray(w)}, [x], prunable={"w": True})["w"]
    hidden = np.tanh(x @ w)
    np.testing.assert_allclose(found.value[0], x.T @ x + hidden.T @ hidden, rtol=1e-4)
    assert found.rows == 10


@pytest.mark.parametrize(
    "use", [jnp.matmul, lambda x, w: _conv(x[..., None], w[..., None], (1,), "SAME")]
)
def test_bfloat16_inputs_are_summed_in_float32(use):
    # 401 is no bfloat16.
    x, w = jnp.ones((401, 2), jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)
    if use is not jnp.matmul:
        w = w.T
    value = input_statistics(lambda w, x: use(x, w), w, [x])[""].value
    assert value.dtype == jnp.float32
    assert value[0].tolist() == [[401.0, 401.0], [401.0, 401.0]]


def test_features_are_in_the_order_of_the_axes_of_the_kernel():
    kernel = _normal(0, 5, 6, 3)

    def apply(kernel, x):
        return jax.lax.dot_general(x, kernel, (((2, 1), (1, 0)), ((), ())))

    layout = input_statistics(apply, jnp.asarray(kernel), [_normal(1, 2, 5, 6)])[""].arrangement
    np.testing.assert_array_equal(to_matrices(kernel, layout)[0], kernel.reshape(30, 3))


# --- Wanda


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.95])
def test_wanda_is_the_reference_and_changes_no_weight_that_stays(sparsity):
    w, x = _normal(0, 21, 6), _correlated(1, 40, 21)
    pruned, masks = wanda(_linear, {"kernel": jnp.asarray(w)}, [x[:30], x[30:]], sparsity)
    expected = reference.wanda(w, x, sparsity)
    np.testing.assert_array_equal(masks["kernel"], expected)
    np.testing.assert_array_equal(pruned["kernel"], np.where(expected, w, 0))


def test_wanda_with_equal_norms_is_magnitude_within_each_output():
    w = _normal(0, 16, 5)
    _, masks = wanda(_linear, {"kernel": jnp.asarray(w)}, [np.eye(16, dtype=np.float32)], 0.7)
    ranks = np.argsort(np.argsort(-np.abs(w), axis=0), axis=0)
    np.testing.assert_array_equal(masks["kernel"], ranks < reference.keep_count(16, 0.7))


def test_wanda_keeps_the_lower_of_equal_scores():
    _, masks = wanda(_linear, {"kernel": jnp.ones((4, 3))}, [jnp.ones((2, 4))], 0.5)
    np.testing.assert_array_equal(masks["kernel"], np.arange(4)[:, None] < 2 + np.zeros((1, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("n_m", [(2, 4), (1, 2), (4, 8)])
def test_wanda_keeps_n_of_m_input_features(n_m):
    w, x = _normal(0, 16, 6), _correlated(1, 40, 16)
    _, masks = wanda(_linear, {"kernel": jnp.asarray(w)}, [x], n_m=n_m)
    np.testing.assert_array_equal(masks["kernel"], reference.wanda(w, x, n_m=n_m))


# --- SparseGPT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("features", "outputs", "block", "sparsity"),
    [(24, 7, 128, 0.5), (24, 7, 8, 0.5), (29, 5, 8, 0.3), (24, 1, 5, 0.9), (6, 4, 2, 0.0)],
)
def test_sparsegpt_is_the_reference(features, outputs, block, sparsity):
    w, x = _normal(0, features, outputs), _correlated(1, 60, features)
    params = {"kernel": jnp.asarray(w)}
    pruned, masks = sparsegpt(_linear, params, [x[:32], x[32:]], sparsity, block=block)
    expected, mask = reference.sparsegpt(w, x, sparsity, block=block)
    np.testing.assert_array_equal(masks["kernel"], mask)
    np.testing.assert_allclose(pruned["kernel"], expected, rtol=2e-3, atol=2e-3)
    for start in range(0, features, block):
        part = mask[start : start + block]
        assert part.sum() == reference.keep_count(part.size, sparsity)


@pytest.mark.slow
@pytest.mark.parametrize(("n_m", "block"), [((2, 4), 128), ((2, 4), 8), ((1, 2), 6), ((3, 8), 8)])
def test_sparsegpt_keeps_n_of_m_input_features(n_m, block):
    w, x = _normal(0, 16, 6), _correlated(1, 40, 16)
    pruned, masks = sparsegpt(_linear, {"kernel": jnp.asarray(w)}, [x], n_m=n_m, block=block)
    expected, mask = reference.sparsegpt(w, x, n_m=n_m)
    np.testing.assert_array_equal(masks["kernel"], mask)
    np.testing.assert_allclose(pruned["kernel"], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("n_m", [None, (2, 4)])
def test_sparsegpt_with_a_multiple_of_the_identity_is_blockwise_magnitude_without_update(n_m):
    w = _normal(0, 160, 6)
    x = 3 * np.eye(160, dtype=np.float32)
    amount = {"sparsity": 0.6} if n_m is None else {"n_m": n_m}
    pruned, masks = sparsegpt(_linear, {"kernel": jnp.asarray(w)}, [x], **amount)
    expected = np.zeros(w.shape, bool)
    if n_m is None:
        for part, out in [(w[:128], expected[:128]), (w[128:], expected[128:])]:
            (out[:],) = reference.largest([np.abs(part)], reference.keep_count(part.size, 0.6))
    else:
        expected = reference.wanda(w, x, n_m=n_m)
    np.testing.assert_array_equal(masks["kernel"], expected)
    np.testing.assert_array_equal(pruned["kernel"], np.where(expected, w, 0))


def test_sparsegpt_keeps_the_lower_of_equal_scores():
    params, x = {"kernel": jnp.ones((5, 3))}, np.eye(5, dtype=np.float32)
    _, masks = sparsegpt(_linear, params, [x], 0.5, block=4)
    # 6 of 12 in the block of 4 features, 1 of 3 in the block of one.
    np.testing.assert_array_equal(masks["kernel"].reshape(-1), [1] * 6 + [0] * 6 + [1, 0, 0])


def test_sparsegpt_is_least_squares_where_all_pruned_features_come_first():
    # Then every weight that stays is free to move: the sweep must end at the best solution.
    w, x = _normal(0, 12, 3), _correlated(1, 50, 12)
    w[:6] *= 1e-3
    pruned, masks = sparsegpt(_linear, {"kernel": jnp.asarray(w)}, [x], 0.5, block=12)
    assert not masks["kernel"][:6].any()
    assert masks["kernel"][6:].all()
    hessian = (x.T @ x).astype(float)
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(12)
    moved = w[6:] + np.linalg.solve(hessian[6:, 6:], hessian[6:, :6] @ w[:6])
    np.testing.assert_allclose(pruned["kernel"][6:], moved, rtol=1e-4, atol=1e-6)


def test_dead_features_get_weights_of_zero_and_leave_the_others_alone():
    w, x = _normal(0, 8, 4), _correlated(1, 30, 8)
    x[:, [2, 5]] = 0
    x *= 0.1  # so that the dead features' 1 counts in the mean of the diagonal
    pruned, masks = sparsegpt(_linear, {"kernel": jnp.asarray(w)}, [x], 0.5)
    expected, mask = reference.sparsegpt(w, x, 0.5)
    assert not pruned["kernel"][jnp.array([2, 5])].any()
    np.testing.assert_array_equal(masks["kernel"], mask)
    np.testing.assert_allclose(pruned["kernel"], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_sparsegpt_reconstructs_better_than_wanda_better_than_magnitude():
    # On average over 20 layers; single layers may come out the other way round.
    errors = []
    for seed in range(20):
        w, x = _normal(seed, 32, 16), _correlated(100 + seed, 128, 32)
        params = {"kernel": jnp.asarray(w)}
        candidates = [
            sparsegpt(_linear, params, [x], 0.5)[0],
            wanda(_linear, params, [x], 0.5)[0],
            jaxprune.prune(params, 0.5)[0],
        ]
        errors.append(
            [
                np.linalg.norm(x @ w - x @ np.asarray(c["kernel"])) / np.linalg.norm(x @ w)
                for c in candidates
            ]
        )
    means, wins = np.mean(errors, axis=0), np.mean(np.diff(errors, axis=1) > 0, axis=0)
    assert means[0] < 0.8 * means[1]
    assert means[1] < 0.8 * means[2]
    assert (wins >= 0.8).all()


def test_one_compilation_for_each_shape():
    sparsegpt_module._prune.clear_cache()
    params = {str(i): jnp.asarray(_normal(i, 9, 9)) for i in range(3)}

    def apply(params, x):
        for name in sorted(params):
            x = x @ params[name]
        return x

    sparsegpt(apply, params, [_normal(7, 20, 9)], 0.5)
    assert sparsegpt_module._prune._cache_size() == 1


# --- both methods, whole models

METHODS = {"wanda": wanda, "sparsegpt": sparsegpt}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_sequential_shows_each_layer_its_pruned_predecessors(method):
    params = {"b": jnp.asarray(_normal(0, 6, 24)), "a": jnp.asarray(_normal(1, 24, 5))}
    x = _correlated(2, 40, 6)

    def apply(params, x):
        return jnp.tanh(x @ params["b"]) @ params["a"]

    together, masks = method(apply, params, [x], 0.7)
    in_order, masks_in_order = method(apply, params, [x], 0.7, sequential=True)
    np.testing.assert_array_equal(in_order["b"], together["b"])

    first, _ = method(apply, params, [x], 0.7, prunable={"a": False, "b": True})
    hidden = jnp.tanh(x @ first["b"])
    second, _ = method(lambda w, h: h @ w, params["a"], [hidden], 0.7)
    np.testing.assert_allclose(in_order["a"], second, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(in_order["a"], together["a"])
    for masked in (masks, masks_in_order):
        assert jax.tree.map(lambda m: (m.shape, m.dtype), masked) == jax.tree.map(
            lambda w: (w.shape, jnp.dtype(bool)), params
        )


@pytest.fixture(scope="module")
def resnet():
    widths = models.Widths(4, ((4, 4), (5, 8), (16, 16)))
    model = models.resnet8(widths=widths, rngs=nnx.Rngs(0))
    model.eval()
    return nnx.split(model, nnx.Param, ...)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_resnet_of_nnx_end_to_end(method, resnet):
    graph, params, rest = resnet

    def apply(params, images):
        return nnx.merge(graph, params, rest)(images)

    images = _normal(0, 8, 8, 8, 3)
    pruned, masks = method(apply, params, [images], 0.5)
    named = dict(jaxprune.trees.leaves_with_paths(masks))
    for (path, before), (_, after) in zip(
        jaxprune.trees.leaves_with_paths(params), jaxprune.trees.leaves_with_paths(pruned)
    ):
        mask = np.asarray(named[path])
        assert mask.shape == before.shape and mask.dtype == bool
        assert not np.asarray(after)[~mask].any()
        if not path.endswith("kernel"):
            assert mask.all()
            np.testing.assert_array_equal(after, before)
            continue
        columns = mask.reshape(-1, mask.shape[-1])
        if method is wanda:
            assert set(columns.sum(axis=0)) == {reference.keep_count(len(columns), 0.5)}
        else:
            for start in range(0, len(columns), 128):
                part = columns[start : start + 128]
                assert part.sum() == reference.keep_count(part.size, 0.5)
    assert np.isfinite(jax.jit(apply)(pruned, images)).all()
    assert type(pruned) is type(params)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), dtype=jnp.bfloat16, name="conv")(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="up")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_linen_network_with_a_cast_and_patterns(method):
    images = _normal(0, 4, 5, 5, 4)
    params = _Net().init(jax.random.key(0), images)
    _, masks = method(_Net().apply, params, [images], n_m=(1, 2))
    for name in ("conv", "up", "head"):
        kernel = np.asarray(masks["params"][name]["kernel"])
        pairs = kernel.reshape(*kernel.shape[:-2], -1, 2, kernel.shape[-1])
        assert (pairs.sum(axis=-2) == 1).all()
        assert np.asarray(masks["params"][name]["bias"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_groups_are_pruned_as_layers_of_their_own(method):
    kernel, image = _normal(0, 3, 3, 2, 6), _normal(1, 2, 6, 6, 4)

    def conv(k, x, groups):
        return _conv(x, k, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups)

    pruned, masks = method(lambda k, x: conv(k, x, 2), jnp.asarray(kernel), [image], 0.5)
    for group in range(2):
        part, inputs = np.s_[..., 3 * group : 3 * group + 3], image[..., 2 * group : 2 * group + 2]
        alone, mask = method(lambda k, x: conv(k, x, 1), jnp.asarray(kernel[part]), [inputs], 0.5)
        np.testing.assert_array_equal(masks[part], mask)
        np.testing.assert_allclose(pruned[part], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_dtypes_stay_and_zeros_are_exact_in_bfloat16(method):
    params = [jnp.asarray(_normal(0, 10, 4), jnp.bfloat16)]
    pruned, masks = method(lambda p, x: x @ p[0], params, [_correlated(1, 20, 10)], 0.5)
    assert pruned[0].dtype == jnp.bfloat16
    assert not pruned[0][~masks[0]].any()
    assert masks[0].sum() == 20


# --- faults

W = jnp.asarray(_normal(0, 4, 4))


def _changed(w):
    return jax.lax.scan(lambda w, _: (w * 0.5, None), w, None, length=2)[0]


def _handed_on(w, x):
    hidden, copies = jax.lax.scan(lambda h, _: (h @ w, w.T), x, None, length=2)
    return hidden @ copies[0]


def _while(w, x):
    return jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h @ w, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (lambda p, x: jnp.tanh(p["w"][jnp.array([0, 1])]), "used by `gather`, then `tanh`"),
        (lambda p, x: p["w"][jnp.array([0, 1])], "`apply` never multiplies it"),
        (
            lambda p, x: x[:, :2] @ jax.lax.dynamic_slice_in_dim(p["w"], x[0, 0].astype(int), 2),
            "used by `dynamic_slice`",
        ),
        (lambda p, x: x @ _changed(p["w"]), "changed by `scan`"),
        (lambda p, x: _handed_on(p["w"], x), "returned by `scan`"),
        (lambda p, x: _while(p["w"], x), "used by `while`"),
        (lambda p, x: x @ p["w"][:2].repeat(2, 0), "used by `slice`"),
        (lambda p, x: x @ (p["w"] + x), "used by `add`"),
        (lambda p, x: x @ (p["w"] + p["w"]), "used by `add`"),
        (
            lambda p, x: jnp.einsum(
                "bki,kij->bj", jnp.stack([x, x], 1), p["w"].reshape(2, 4, 2)[jnp.array([0, 1])]
            ),
            "is looked up by an index over which a product sums",
        ),
        (
            lambda p, x: jax.lax.ragged_dot(p["w"], x.reshape(2, 4, 2), jnp.array([1, 3])),
            "is the left side of `ragged_dot`, not its kernels",
        ),
        (lambda p, x: jax.debug.callback(lambda w: None, p["w"]), "used by `debug_callback`"),
        (lambda p, x: x @ (p["w"] * 2), "used by `mul`"),
        (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1), "used by `concatenate`"),
        (lambda p, x: x @ jnp.broadcast_to(p["w"], (2, 4, 4)), "used by `broadcast_in_dim`"),
        (lambda p, x: x @ p["w"].astype(jnp.int32), "used by `convert_element_type`"),
        (lambda p, x: x @ p["w"] + p["w"].sum(), "used by `reduce_sum`"),
        (lambda p, x: x @ p["w"] + x @ p["w"].T, "used twice, with different input features"),
        (lambda p, x: p["w"] @ p["w"], "multiplied by another leaf"),
        (lambda p, x: x, "`apply` never multiplies it"),
        (
            lambda p, x: _conv(p["w"][None, None], jnp.ones((1, 1, 2, 2)), (1, 1), "SAME"),
            "is the image of a convolution, not its kernel",
        ),
        (
            lambda p, x: _conv(
                x[:, :, None, None], p["w"][:, :, None, None], (1, 1), "SAME", batch_group_count=4
            ),
            "is the kernel of a convolution with `batch_group_count`",
        ),
    ],
)
@pytest.mark.parametrize("sequential", [False, True])
def test_leaves_that_cannot_be_pruned_are_listed_with_the_reason(apply, reason, sequential):
    params = {"ok": W, "w": W, "z": W}

    def both(params, x):
        return apply({"w": params["w"]}, x), apply({"w": params["z"]}, x), x @ params["ok"]

    x = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="exclude these with `prunable`") as error:
        wanda(both, params, [x], 0.5, sequential=sequential)
    assert str(error.value).splitlines()[1:] == [f"  w: {reason}", f"  z: {reason}"]
    _, masks = wanda(both, params, [x], 0.5, prunable=lambda path, _: path == "ok")
    assert masks["w"].all() and masks["ok"].sum() == 8


def test_leaves_with_inputs_that_are_not_finite_are_named():
    params = {"a": W, "b": W, "c": W}

    def apply(params, x):
        return x @ params["a"], jnp.log(x - 1) @ params["b"], jnp.exp(1e4 * x) @ params["c"]

    for method in METHODS.values():
        with pytest.raises(ValueError, match=r"(?s)not finite.*\n  b\n  c$"):
            method(apply, params, [jnp.ones((2, 4)) / 2], 0.5)


def test_weights_that_are_not_finite_are_named():
    params = {"a": W, "b": W.at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"(?s)`params`.*not finite:\n  b$"):
        sparsegpt(lambda p, x: (x @ p["a"], x @ p["b"]), params, [jnp.ones((2, 4))], 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [False, True])
def test_a_hessian_without_inverse_is_named(sequential):
    x = 1e3 * _normal(0, 200, 1) @ _normal(1, 1, 40)
    params = {"kernel": jnp.asarray(_normal(2, 40, 3)), "next": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match=r"(?s)raise `damping`.*\n  kernel"):
        sparsegpt(
            lambda params, x: _linear(params, x) @ params["next"],
            params,
            [x],
            0.5,
            damping=1e-12,
            sequential=sequential,
        )


def test_numbers_of_features_that_m_does_not_divide_are_listed():
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((4, 3)), "c": jnp.ones((3, 2))}

    def apply(params, x):
        return x @ params["a"] @ params["b"] @ params["c"]

    for method in METHODS.values():
        with pytest.raises(ValueError, match=r"(?s)`n_m`.*\n  a: 6 features\n  c: 3 features$"):
            method(apply, params, [jnp.ones((2, 6))], n_m=(2, 4))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("batches", "arguments", "error", "match"),
    [
        ([X], {}, ValueError, "exactly one of `sparsity` and `n_m`"),
        ([X], {"sparsity": 0.5, "n_m": (2, 4)}, ValueError, "exactly one of"),
        ([X], {"sparsity": 1.0}, ValueError, r"`sparsity` must lie in \[0, 1\), but is 1.0"),
        ([X], {"sparsity": -0.1}, ValueError, "`sparsity`"),
        ([X], {"n_m": (5, 4)}, ValueError, "1 <= n <= m"),
        ([X], {"n_m": (0, 0)}, ValueError, "1 <= n <= m"),
        ([X], {"n_m": [2, 4]}, ValueError, "must be a tuple"),
        ([], {"sparsity": 0.5}, ValueError, "`batches` is empty"),
        (X, {"sparsity": 0.5}, TypeError, "`batches` must be an iterable of batches"),
        (jnp.asarray(X), {"sparsity": 0.5}, TypeError, "pass `.batch.`"),
    ],
)
def test_bad_arguments(method, batches, arguments, error, match):
    with pytest.raises(error, match=match):
        method(_linear, {"kernel": W}, batches, **arguments)


@pytest.mark.parametrize("arguments", [{"block": 0}, {"block": 6, "n_m": (2, 4)}, {"damping": 0.0}])
def test_bad_arguments_of_sparsegpt(arguments):
    amount = {} if "n_m" in arguments else {"sparsity": 0.5}
    with pytest.raises(ValueError, match="`block`|`damping`"):
        sparsegpt(_linear, {"kernel": W}, [X], **amount, **arguments)


@pytest.mark.parametrize("function", [wanda, sparsegpt])
def test_a_whole_module_is_refused_with_the_fix(function):
    params = {"kernel": jnp.ones((2, 2)), "activation": jax.nn.relu}
    with pytest.raises(ValueError, match=r"equinox\.partition(.|\n)*activation: custom_jvp"):
        function(lambda p, x: x @ p["kernel"], params, [jnp.ones((1, 2))], 0.5)


# --- stacked layers


def _scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]


def _unrolled(params, x):
    for i in range(len(params)):
        x = jnp.tanh(x @ params[f"{i}"])
    return x


@pytest.mark.slow
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"n_m": (2, 4)}])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_each_layer_of_a_stack_is_pruned_as_a_layer_of_its_own(method, axis, amount):
    layers, x = _normal(0, 3, 8, 8), [_correlated(1, 40, 8), _correlated(2, 20, 8)]
    params = {"layers": jnp.moveaxis(layers, 0, axis)}

    def apply(params, x):
        return _scanned({"layers": jnp.moveaxis(params["layers"], axis, 0)}, x)

    single = {f"{i}": jnp.asarray(layer) for i, layer in enumerate(layers)}
    pruned, masks = method(apply, params, x, stacked=lambda path, leaf: axis, **amount)
    alone, wanted = method(_unrolled, single, x, **amount)
    for i in range(3):
        np.testing.assert_array_equal(jnp.take(masks["layers"], i, axis), wanted[f"{i}"])
        got = jnp.take(pruned["layers"], i, axis)
        np.testing.assert_allclose(got, alone[f"{i}"], rtol=1e-3, atol=1e-3)


def test_statistics_of_stacks_shared_weights_and_scans_in_scans():
    x = _normal(0, 5, 4)
    params = {"all": _normal(1, 2, 3, 4, 4), "shared": _normal(2, 4, 4)}

    def apply(params, x):
        def outer(h, layers):
            h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, layers, reverse=True)
            return h @ params["shared"], None

        return jax.lax.scan(outer, x, params["all"])[0]

    found = input_statistics(apply, jax.tree.map(jnp.asarray, params), [x])
    expected, shared, h = np.zeros((6, 4, 4)), np.zeros((4, 4)), x
    for i in range(2):
        for j in reversed(range(3)):
            expected[3 * i + j] = h.T @ h
            h = np.tanh(h @ params["all"][i, j])
        shared += h.T @ h
        h = h @ params["shared"]
    matrices = to_matrices(params["all"], found["all"].arrangement)
    np.testing.assert_array_equal(matrices, params["all"].reshape(6, 4, 4))
    np.testing.assert_allclose(found["all"].value, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["shared"].value[0], shared, rtol=1e-3, atol=1e-4)
    assert found["all"].rows == 5 and found["shared"].rows == 10


def test_weights_used_at_every_step_of_a_sequence_add_up_their_uses():
    w, x = _normal(0, 4, 4), _normal(1, 6, 3, 4)

    def apply(params, x):
        return jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ params["w"]), h), x[0], x)[1]

    found = input_statistics(apply, {"w": jnp.asarray(w)}, [x])["w"]
    hidden = np.asarray(apply({"w": w}, x))
    wanted = np.einsum("tbi,tbj->ij", hidden, hidden)
    np.testing.assert_allclose(found.value[0], wanted, rtol=1e-4)
    assert found.rows == 18


@pytest.mark.slow
def test_a_stacked_linen_network_with_convolutions():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(nn.Conv(4, (3, 3), name="conv")(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            x, _ = nn.scan(Block, **options)(name="layers")(x, None)
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    net = Net()
    params = net.init(jax.random.key(0), IMAGE)["params"]
    _, masks = wanda(lambda p, x: net.apply({"params": p}, x), params, [IMAGE], n_m=(2, 4))
    kernel = np.asarray(masks["layers"]["conv"]["kernel"])
    assert kernel.shape == (2, 3, 3, 4, 4) and (kernel.sum(axis=3) == 2).all()
    assert np.asarray(masks["layers"]["conv"]["bias"]).all()


def test_stacked_vectors_are_no_kernels_and_stacks_are_compared_with_what_is_found():
    params = {"layers": jnp.ones((3, 4, 4)), "offsets": jnp.ones((3, 4)), "w": jnp.ones((4, 4))}

    def apply(params, x):
        def layer(x, p):
            w, offset = p
            return x @ w + offset[None], None

        return jax.lax.scan(layer, x, (params["layers"], params["offsets"]))[0] @ params["w"]

    with pytest.raises(ValueError, match=r"\n  offsets: used by `add`(\n|$)"):
        wanda(apply, params, [X], 0.5)
    of_stack = lambda path, leaf: None if path == "w" else 0  # noqa: E731
    _, masks = wanda(apply, params, [X], 0.5, stacked=of_stack)
    assert masks["offsets"].all() and masks["layers"].sum(axis=1).tolist() == [[2] * 4] * 3
    with pytest.raises(ValueError, match="`stacked` must name axes that number copies") as error:
        wanda(
            apply,
            params,
            [X],
            0.5,
            prunable=lambda p, x: p in ("w", "layers"),
            stacked=lambda p, x: 1,
        )
    assert str(error.value).splitlines()[1:] == [
        "  layers: axes (1,), but the copies that `apply` uses are (0,)",
        "  w: axes (1,), but the copies that `apply` uses are ()",
    ]
