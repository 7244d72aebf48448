"""Scores before training: definitions by finite differences, SynFlow's conservation, faults."""

import warnings
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxprune
from jaxprune import at_init, budgets, models, trees
from tests.support import reference

IMAGES, CLASSES = 6, 3


def _weights(seed):
    """Kernel, bias, kernel, bias of a small network; biases are not 0."""
    rng = np.random.default_rng(seed)
    shapes = [(4, 5), (5,), (5, CLASSES), (CLASSES,)]
    return [np.float32(rng.normal(size=shape) / 2) for shape in shapes]


def _batch(seed):
    rng = np.random.default_rng(seed + 1000)
    targets = np.eye(CLASSES)[rng.integers(0, CLASSES, IMAGES)]
    return np.float32(rng.normal(size=(IMAGES, 4))), np.float32(targets)


def _cross_entropy(xp, weights, images, targets, temperature):
    """Of a network of two layers, in NumPy or JAX, written without broadcasting of ranks."""
    w1, b1, w2, b2 = weights
    hidden = xp.tanh(images @ w1 + b1[None])
    logits = (hidden @ w2 + b2[None]) / temperature
    log_sum = xp.log(xp.sum(xp.exp(logits), axis=1, keepdims=True))
    return -xp.sum(targets * (logits - log_sum)) / len(images)


def _as_tree(weights):
    """A tree with leaves of all kinds around the weights."""
    w1, b1, w2, b2 = map(jnp.asarray, weights)
    layers = [{"kernel": w1, "bias": b1}, {"kernel": w2, "bias": b2}]
    return {"layers": layers, "count": jnp.arange(3), "key": jax.random.key(0), "none": None}


def _from_tree(tree):
    first, second = tree["layers"]
    return [first["kernel"], first["bias"], second["kernel"], second["bias"]]


def _loss(params, images, targets, temperature=1.0):
    return _cross_entropy(jnp, _from_tree(params), images, targets, temperature)


def _dense(weights, x):
    for kernel in weights[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ weights[-1]


def _kernels(seed, widths):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in zip(widths, widths[1:])]


def _conv_net(params, x):
    """Two convolutions of stride 1 and 2, a mean over positions and a linear layer."""
    for kernel, stride in zip(params["convs"], (1, 2)):
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    return jnp.mean(x, axis=(1, 2)) @ params["head"]


def _conv_params(seed):
    rng = np.random.default_rng(seed)
    shapes = [(3, 3, 2, 6), (3, 3, 6, 4)]
    convs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    return {"convs": convs, "head": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}


def _layer_sums(scores):
    return np.array([np.asarray(score, np.float64).sum() for score in jax.tree.leaves(scores)])


def _close_to_largest(got, wanted, share):
    """Equal up to a share of the largest entry."""
    largest = max(np.abs(w).max() for w in wanted)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=share * largest)


# Every function as (params, batch) -> scores of the same tree, for what holds for all three.
def _synflow_of_tree(params, *batch):
    def apply(p, x):
        w1, b1, w2, b2 = _from_tree(p)
        return jax.nn.relu(x @ w1 + b1[None]) @ w2 + b2[None]

    del batch
    return at_init.synflow(apply, params, (1, 4))


ALL = {
    "snip": lambda params, *batch: at_init.snip(_loss, params, *batch),
    "grasp": lambda params, *batch: at_init.grasp(_loss, params, *batch),
    "synflow": _synflow_of_tree,
}


@pytest.mark.slow
@given(seed=st.integers(0, 7))
def test_snip_is_the_sensitivity_to_a_mask(seed):
    weights, batch = _weights(seed), _batch(seed)
    scores = at_init.snip(_loss, _as_tree(weights), *batch)
    wanted = reference.snip(lambda w: _cross_entropy(np, w, *batch, 1.0), weights)
    _close_to_largest(_from_tree(scores), wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("seed", range(3))
def test_grasp_is_the_weight_times_the_change_of_the_gradient_along_itself(seed, temperature):
    weights, batch = _weights(seed), _batch(seed)
    scores = at_init.grasp(_loss, _as_tree(weights), *batch, temperature)
    wanted = reference.grasp(lambda w: _cross_entropy(np, w, *batch, temperature), weights)
    _close_to_largest(_from_tree(scores), wanted, 2e-3)


def test_grasp_of_a_quadratic_loss():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    hessian, linear, w = root @ root.T, rng.normal(size=5), rng.normal(size=5)
    scores = at_init.grasp(lambda v: v @ jnp.asarray(hessian) @ v / 2 + linear @ v, jnp.asarray(w))
    wanted = w * (hessian @ (hessian @ w + linear))
    np.testing.assert_allclose(scores, wanted / np.abs(wanted).sum(), rtol=1e-4)


def _gradient_flow(weights, batch):
    found = reference.slopes(lambda w: _cross_entropy(np, w, *batch, 1.0), weights)
    return sum((g**2).sum() for g in found)


def test_grasp_says_how_the_gradient_flow_changes_when_a_weight_shrinks():
    weights, batch, share = _weights(0), _batch(0), 1e-4
    scores = _from_tree(at_init.grasp(_loss, _as_tree(weights), *batch))
    changes = []
    for i, w in enumerate(weights):
        changes.append(np.zeros(w.shape))
        for index in np.ndindex(w.shape):
            shrunk = [np.array(v, np.float64) for v in weights]
            shrunk[i][index] *= 1 - share
            changes[i][index] = _gradient_flow(shrunk, batch) - _gradient_flow(weights, batch)
    per_score = -sum(np.abs(c).sum() for c in changes)  # 2 e sum |w Hg|
    _close_to_largest(scores, [c / per_score for c in changes], 1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_grasp_removes_first_what_holds_the_gradient_flow_back(seed):
    weights, batch = _weights(seed), _batch(seed)
    scores = _from_tree(at_init.grasp(_loss, _as_tree(weights), *batch))
    middle = np.median(np.concatenate([s.reshape(-1) for s in scores]))

    def flow(shrink):
        shrunk = [np.where(shrink(s), 0.99 * w, w) for w, s in zip(weights, scores)]
        return _gradient_flow(shrunk, batch)

    assert flow(lambda s: s < 0) > _gradient_flow(weights, batch)
    assert flow(lambda s: s < middle) > flow(lambda s: s >= middle)


@pytest.mark.slow
@given(seed=st.integers(0, 2), widths=st.sampled_from([(3, 1), (1, 4, 1), (2, 7, 3, 5)]))
def test_synflow_is_the_share_of_paths_through_each_weight(seed, widths):
    kernels = _kernels(seed, widths)
    scores = at_init.synflow(_dense, kernels, (1, widths[0]))
    for got, wanted in zip(scores, reference.synflow(kernels), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-9)


NETS = {
    "dense": (_dense, lambda seed: _kernels(seed, (8, 3, 20, 5)), (1, 8)),
    "conv": (_conv_net, _conv_params, (1, 6, 6, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_synflow_gives_every_layer_of_a_plain_network_the_same_sum(name, sparsity):
    apply, build, shape = NETS[name]

    def cut(w):
        return jnp.where(jnp.abs(w) < np.quantile(jnp.abs(w), sparsity), 0, w)

    pruned = jax.tree.map(cut, build(1))
    scores = at_init.synflow(apply, pruned, shape)
    np.testing.assert_allclose(_layer_sums(scores), 1 / 3, rtol=1e-5)
    for weight, score in zip(*map(jax.tree.leaves, (pruned, scores)), strict=True):
        assert (np.asarray(score)[np.asarray(weight) == 0] == 0).all()


def _without_floors(shapes, sparsity):
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    return budgets.Budget(budgets.keep_count(size, sparsity), (0,) * len(shapes))


@pytest.mark.slow
def test_a_single_cut_empties_a_layer_and_a_hundred_rounds_do_not():
    # One wide pair of layers: its many weights share the sum that 32 weights share at the end.
    kernels = _kernels(0, (8, 100, 500, 8, 4))
    score = jax.jit(lambda p: at_init.synflow(_dense, p, (1, 8)))
    sparsity, options = 0.999, {"budget": _without_floors}

    def kept(masks):
        return [int(np.sum(mask)) for mask in masks]

    _, once = jaxprune.prune(kernels, sparsity, score=score(kernels), **options)
    pruned, rounds = jaxprune.prune_in_rounds(kernels, sparsity, score, **options)
    assert kept(once)[1] == 0
    assert min(kept(rounds)) > 0
    assert sum(kept(once)) == sum(kept(rounds)) == 55
    assert float(jnp.sum(_dense([jnp.abs(w) for w in pruned], jnp.ones((1, 8))))) > 0
    with pytest.raises(ValueError, match="has 0.0e"):
        at_init.synflow(_dense, jaxprune.apply_masks(kernels, once), (1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_are_float32_like_the_parameters_and_sum_to_one(name, dtype):
    params = _as_tree([w.astype(dtype) for w in _weights(0)])
    scores = ALL[name](params, *_batch(0))
    assert jax.tree.structure(scores) == jax.tree.structure(params)
    for score, leaf in zip(*map(jax.tree.leaves, (scores, params)), strict=True):
        assert score.dtype == jnp.float32 and score.shape == leaf.shape
    assert not scores["count"].any() and scores["key"] == 0 and scores["none"] is None
    sizes = _layer_sums([np.abs(score) for score in _from_tree(scores)])
    np.testing.assert_allclose(sizes.sum(), 1, rtol=1e-5)


def test_products_of_bfloat16_are_not_rounded_to_it():
    w = jnp.array([1.0 + 2.0**-7, 1.0], jnp.bfloat16)  # the gradient of half the square is w
    for name in ("snip", "grasp"):
        scores = getattr(at_init, name)(lambda v: jnp.sum(v * v / 2), w)
        np.testing.assert_allclose(scores[0] / scores[1], (1 + 2.0**-7) ** 2, rtol=1e-6)
    scores = at_init.synflow(lambda v, x: jnp.sum(x * v * v / 2), w, (2,))
    np.testing.assert_allclose(scores[0] / scores[1], (1 + 2.0**-7) ** 2, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_jit_changes_nothing(name):
    params, batch = _as_tree(_weights(1)), _batch(1)
    eager, jitted = ALL[name](params, *batch), jax.jit(ALL[name])(params, *batch)
    assert jax.tree.structure(jitted) == jax.tree.structure(params)
    for a, b in zip(_from_tree(eager), _from_tree(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class _Two(NamedTuple):
    first: jax.Array
    second: jax.Array


@pytest.mark.parametrize("build", [list, tuple, lambda leaves: _Two(*leaves)])
def test_any_tree_of_parameters(build):
    kernels = _kernels(0, (3, 4, 2))
    wanted = at_init.synflow(_dense, kernels, (1, 3))
    scores = at_init.synflow(lambda p, x: _dense(list(p), x), build(kernels), (1, 3))
    assert type(scores) is type(build(kernels))
    np.testing.assert_array_equal(scores[0], wanted[0])
    snip = at_init.snip(lambda p: jnp.mean(_dense(list(p), jnp.ones((1, 3)))), build(kernels))
    assert type(snip) is type(build(kernels))


def test_a_score_tree_decides_what_is_pruned():
    weights, batch = _weights(2), _batch(2)
    params = _as_tree(weights)
    scores = at_init.snip(_loss, params, *batch)
    _, masks = jaxprune.prune(params, 0.6, score=scores, budget=budgets.global_budget(0))
    kernels = [np.asarray(layer["kernel"]) for layer in scores["layers"]]
    for layer, wanted in zip(masks["layers"], reference.largest(kernels, 14), strict=True):
        np.testing.assert_array_equal(layer["kernel"], wanted)


@pytest.mark.parametrize(
    "form",
    [
        [1, 3],
        jax.ShapeDtypeStruct((1, 3), jnp.float32),
        np.full((1, 3), np.nan, np.float32),
        np.zeros((1, 3), np.uint8),
    ],
    ids=["list", "struct", "array", "bytes"],
)
def test_only_the_shape_of_the_input_counts(form):
    kernels = _kernels(0, (3, 4, 2))

    def apply(p, x):  # with a bias, or a multiple of the input would give the same scores
        return _dense(p, x) + jnp.sum(p[0])

    wanted = at_init.synflow(apply, kernels, (1, 3))
    for a, b in zip(at_init.synflow(apply, kernels, form), wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_input_has_the_dtype_it_says_or_that_of_the_parameters():
    seen = []

    def apply(params, x):
        seen.extend([x["a"].dtype, x["b"].dtype])
        return jnp.sum(x["a"] @ params).astype(jnp.float32) + jnp.sum(x["b"]).astype(jnp.float32)

    inputs = {
        "a": jax.ShapeDtypeStruct((1, 2), jnp.int8),
        "b": jax.ShapeDtypeStruct((2,), jnp.float16),
    }
    at_init.synflow(apply, jnp.ones((2, 2), jnp.bfloat16), inputs)
    assert seen == [jnp.bfloat16, jnp.float16]


def test_synflow_takes_all_floating_outputs():
    def apply(params, x):
        return {"a": x @ params, "b": 3 * x @ params[:, :1], "index": jnp.arange(2)}

    scores = at_init.synflow(apply, jnp.array([[1.0, 2.0]]), (1, 1))
    np.testing.assert_allclose(scores, [[4 / 6, 2 / 6]], rtol=1e-6)


def test_the_input_is_one():
    scores = at_init.synflow(lambda p, x: x * p[0] + p[1], jnp.array([1.0, 3.0]), (1,))
    np.testing.assert_allclose(scores, [0.25, 0.75], rtol=1e-6)


def test_synflow_of_what_lowers_the_signal_is_negative():
    scores = at_init.synflow(lambda w, x: x[0] * (w[0] - w[1]), jnp.array([1.0, -3.0]), (1,))
    np.testing.assert_allclose(scores, [0.25, -0.75], rtol=1e-6)


def _deep(depth=40, width=32):
    return _kernels(0, (width,) * (depth + 1))


@pytest.mark.slow
def test_a_signal_beyond_float32_is_an_error_that_says_what_to_do():
    kernels = _deep()
    with pytest.raises(ValueError, match="too deep .* scale the input .* or compute in float64"):
        at_init.synflow(_dense, kernels, (1, 32))
    with pytest.raises(ValueError, match="between 1.2e-35 and 3.4e"):
        at_init.synflow(_dense, [w * 1e-3 for w in kernels], (1, 32))
    with pytest.raises(ValueError, match="but has nan"):
        at_init.synflow(_dense, [w * jnp.nan for w in kernels], (1, 32))
    # Traced there is no check; nobody can mistake the result for a ranking.
    traced = jax.jit(lambda p: at_init.synflow(_dense, p, (1, 32)))(kernels)
    assert all(np.isnan(score).all() for score in traced)


@pytest.mark.slow
def test_scaled_input_and_float64_give_the_scores_of_a_deep_network():
    kernels = _deep()
    scaled = at_init.synflow(lambda p, x: _dense(p, 1e-30 * x), kernels, (1, 32))
    with jax.enable_x64(True):
        double = [kernel.astype(jnp.float64) for kernel in kernels]
        exact = at_init.synflow(_dense, double, (1, 32))
    np.testing.assert_allclose(_layer_sums(scaled), 1 / len(kernels), rtol=1e-4)
    for a, b, c in zip(scaled, exact, reference.synflow(kernels), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        np.testing.assert_allclose(b, c, rtol=1e-5)
        np.testing.assert_allclose(a, c, rtol=1e-3)


def _resnet():
    """A thin residual network in evaluation mode, its parameters, and those with scales of 1."""
    widths = models.Widths(stem=4, blocks=((3, 4), (3, 5), (3, 6)))
    model = models.resnet8(widths=widths, rngs=nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def with_ones(path, leaf):
        return jnp.ones_like(leaf) if trees.path_string(path).endswith("scale") else leaf

    ones = jax.tree_util.tree_map_with_path(with_ones, params)
    # Inside of `jit` it is one program, and not one for each operation.
    return jax.jit(lambda p, x: nnx.merge(graph, p, rest)(x)), params, ones


@pytest.mark.slow
def test_a_residual_network_with_and_without_scales_of_zero():
    apply, params, ones = _resnet()
    with pytest.warns(UserWarning, match="blocks/0/conv1/kernel, blocks/0/conv2/kernel") as seen:
        at_init.synflow(apply, params, (1, 8, 8, 3))
    assert len(seen) == 1 and seen[0].filename == __file__
    assert "head" not in str(seen[0].message) and "bias" not in str(seen[0].message)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = at_init.synflow(apply, ones, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    assert jax.tree.structure(scores) == jax.tree.structure(params)
    sums = {path: float(leaf.sum()) for path, leaf in trees.leaves_with_paths(scores)}
    assert all(total > 0 for path, total in sums.items() if path.endswith("kernel"))
    # Every path runs through stem and head, and in a block through both convolutions or none.
    assert sums["stem/conv/kernel"] == pytest.approx(sums["head/kernel"], rel=1e-4)
    assert sums["blocks/1/conv1/kernel"] == pytest.approx(sums["blocks/1/conv2/kernel"], rel=1e-4)
    assert sums["blocks/1/conv1/kernel"] < sums["head/kernel"]


@pytest.mark.parametrize("name", ["snip", "grasp"])
@pytest.mark.parametrize(
    ("loss", "seen"),
    [
        (lambda params: params["a"], r"shape \(3,\), dtype float32"),
        (lambda params: (jnp.sum(params["a"]), params["a"]), "a value of type tuple"),
        (lambda params: jnp.sum(params["a"]).astype(int), r"shape \(\), dtype int32"),
        (lambda params: None, "a value of type NoneType"),
    ],
    ids=["vector", "auxiliary", "integer", "none"],
)
def test_the_loss_must_be_one_number(name, loss, seen):
    with pytest.raises(ValueError, match=f"`loss` must return one .* but returned {seen}"):
        getattr(at_init, name)(loss, {"a": jnp.ones(3)})


def _for_all(params, loss):
    """Calls of the three functions on the same parameters."""
    return [
        lambda: at_init.snip(loss, params),
        lambda: at_init.grasp(loss, params),
        lambda: at_init.synflow(lambda p, x: loss(p) * x, params, (1,)),
    ]


def test_parameters_must_be_arrays_and_one_of_them_floating_point():
    for call in _for_all({"a": jnp.arange(3), "b": None}, lambda p: jnp.float32(1)):
        with pytest.raises(ValueError, match="`params` must have a floating.*\n  a: int32"):
            call()
    for call in _for_all({"a": None}, lambda p: jnp.float32(1)):
        with pytest.raises(ValueError, match="floating-point leaf, but has:\n  no leaves"):
            call()
    for call in _for_all({"a": jnp.ones(3), "f": jnp.tanh, "s": "x"}, lambda p: jnp.float32(1)):
        with pytest.raises(ValueError, match="arrays only.*\n  f: .*\n  s: str"):
            call()


def test_every_leaf_with_scores_that_are_not_finite_is_named():
    params = {"a": jnp.array([0.0, 4.0]), "b": jnp.array([-1.0]), "c": jnp.ones(2)}

    def loss(p):  # sqrt has no slope at 0, and none at all at -1
        return jnp.sum(jnp.sqrt(p["a"])) + jnp.sum(jnp.sqrt(p["b"])) + jnp.sum(p["c"] ** 2)

    for name in ("snip", "grasp"):
        with pytest.raises(ValueError, match="must be finite.*\n  a: 1 of 2\n  b: 1 of 1$"):
            getattr(at_init, name)(loss, params)
        jax.jit(lambda p, name=name: getattr(at_init, name)(loss, p))(params)  # traced: no check
    with pytest.raises(ValueError, match="must be finite, but the derivatives .*\n  a: 1 of 2$"):
        at_init.synflow(lambda p, x: x * jnp.sum(jnp.sqrt(p["a"])), params, (1,))


def test_scores_that_rank_nothing_are_an_error():
    with pytest.raises(ValueError, match="rank nothing"):
        at_init.grasp(lambda p: jnp.sum(p), jnp.ones(3))  # linear: there is no curvature
    with pytest.raises(ValueError, match="rank nothing"):
        at_init.snip(lambda p: jnp.sum(p**2), jnp.zeros(3))
    with pytest.raises(ValueError, match="rank nothing"):
        at_init.synflow(lambda p, x: x, jnp.ones(3), (1,))
    traced = jax.jit(lambda p: at_init.snip(lambda q: jnp.sum(q**2), p))(jnp.zeros(3))
    assert traced.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_a_kernel_without_scores_is_named_in_a_warning(name):
    params = {"dead": jnp.ones((2, 2)), "pruned": jnp.zeros((2, 2)), "used": jnp.ones((2, 2))}
    params["vector"] = jnp.ones(2)
    with pytest.warns(UserWarning, match="all scores are 0 in dead: ") as seen:
        getattr(at_init, name)(lambda p: jnp.sum(p["used"] ** 2) + jnp.sum(p["pruned"]), params)
    assert len(seen) == 1 and seen[0].filename == __file__


@pytest.mark.slow
def test_a_dead_copy_in_a_stack_is_named_in_a_warning():
    weights = jnp.ones((3, 2, 2))
    alive = jnp.array([1.0, 0.0, 1.0])[:, None, None]

    def loss(params):
        return jnp.sum(params["layers"] ** 2 * alive) + jnp.sum(params["offsets"] ** 2)

    params = {"layers": weights, "offsets": jnp.zeros((3, 2))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = at_init.snip(loss, params)  # as one kernel it has scores
    for method in (at_init.snip, at_init.grasp):
        with pytest.warns(UserWarning, match=r"all scores are 0 in layers\[1\]: ") as seen:
            scores = method(loss, params, stacked=lambda path, leaf: 0)
        assert len(seen) == 1 and seen[0].filename == __file__
    np.testing.assert_array_equal(scores["layers"], whole["layers"])

    def apply(params, x):
        return jnp.einsum("bi,leij,le->bj", x, params, jnp.array([[1.0, 0.0], [1.0, 1.0]]))

    with pytest.warns(UserWarning, match=r"all scores are 0 in \[0, 1\]: "):
        at_init.synflow(apply, jnp.ones((2, 2, 3, 2)), (1, 3), stacked=lambda path, leaf: (0, 1))
    # Vectors that are stacked are no kernels.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        at_init.snip(
            lambda p: jnp.sum(p["a"] ** 2),
            {"a": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 2))},
            stacked=lambda path, leaf: 0,
        )


def test_input_and_output_of_synflow_must_make_sense():
    with pytest.raises(ValueError, match="must be a shape .*\n  image: str"):
        at_init.synflow(lambda p, x: p, jnp.ones(2), {"image": "8x8"})
    with pytest.raises(ValueError, match="`apply` must return a floating.* returned .'int32'"):
        at_init.synflow(lambda p, x: jnp.arange(2), jnp.ones(2), (1,))


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_weights_of_eight_bits(dtype):
    """Powers of two are exact in eight bits: the scores are those of float32."""
    exact = {"in": jnp.array([[1.0, -2.0]]), "out": jnp.array([[-2.0], [4.0]])}
    few = jax.tree.map(lambda w: w.astype(dtype), exact)

    def apply(w, x):
        w = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), w)
        return (x.astype(jnp.float32) @ w["in"]) @ w["out"]

    def loss(w):
        return jnp.mean((apply(w, jnp.ones((3, 1))) - 1.0) ** 2)

    for score in (at_init.snip(loss, few), at_init.synflow(apply, few, (1, 1))):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(score))
    wanted = at_init.synflow(apply, exact, (1, 1))
    chex.assert_trees_all_close(at_init.synflow(apply, few, (1, 1)), wanted, rtol=0.1)
