"""Returns scores for pruning before training (SNIP, GraSP, SynFlow); `jaxprune.prune` applies them.

Each function takes a loss or a network with its parameters and returns a tree of float32 scores
like the parameters, not masks: pass it to `jaxprune.prune(params, sparsity, score=scores)`. Weights
with the lowest scores are pruned first. Every floating-point leaf is scored; leaves that are not
floating point have the score 0. The caller of `prune` decides which leaves are pruned, and by how
much. The papers prune only kernels, in one ranking over all layers without a floor:
`budgets.global_budget(0)`.

Derivatives are taken in the dtype of the parameters and multiplied in float32 or wider. Scores are
divided by the sum of their absolute values over the whole tree, which does not change the ranking.
Called with arrays, the functions check their results. Under `jax.jit` there are no values to check.

Beware of scales that start at 0, such as the last norm scale of each residual block in
`jaxprune.models`: nothing passes through the block, so all its kernels have the score 0. Score
parameters in which these scales are 1.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxprune import trees

__all__ = ["grasp", "snip", "synflow"]

# The epsilon of GraSP's authors, who divide by the size of a sum that can cancel to 0.
_GRASP_EPSILON = 1e-10


def snip(loss: Callable[..., Any], params: Any, *batch: Any, stacked: trees.Stacked = None) -> Any:
    """Returns SNIP scores, `|g * w|`: how much the loss depends on the presence of a weight.

    With a mask `m` of ones on the weights, `dL(m * w)/dm = g * w` where `g = dL/dw`. The score is
    `|g * w| / sum |g * w|`, the connection sensitivity of the paper.

    Differs from the paper: biases and norm parameters are scored too and are part of the sum. The
    paper uses one batch (100 images of MNIST, 128 of CIFAR-10) and weights whose variance is scaled
    to the size of the layer; both are the choice of the caller.

    Args:
        loss: function `(params, *batch) -> scalar`, the mean over the batch.
        params: tree of arrays, new and dense.
        *batch: the other arguments of the loss.
        stacked: function `(path, leaf) -> axis, tuple of axes, or None`, the axes that number
            copies of a layer, as in a scan. It does not change the scores; warnings name each copy
            separately.

    Returns:
        Tree of float32 arrays like `params`; the scores are not negative and add up to 1.

    Raises:
        ValueError: if no leaf is floating point or a leaf is not an array; if the loss is not a
            scalar; unless traced, if scores are not finite (each such leaf is named) or all are 0.

    Warns:
        UserWarning: unless traced, if all scores of a kernel, or of one copy of it, are 0
            although its weights are not.

    References:
        Lee, Ajanthan, Torr. SNIP: Single-shot network pruning based on connection sensitivity.
        arXiv:1810.02340.

    Example:
        >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
        >>> scores = snip(loss, jnp.array([1.0, 2.0, 3.0]), jnp.eye(3), jnp.array([0.0, 2.0, 2.0]))
        >>> scores.tolist()  # the second weight is right already
        [0.25, 0.0, 0.75]
    """
    flags = _floating(params)
    weights = trees.pick(params, flags)
    gradients = jax.grad(_of_weights(loss, params, flags, batch))(weights)
    products = [jnp.abs(_product(w, g)) for w, g in zip(weights, gradients, strict=True)]
    return _as_scores(params, flags, products, stacked, "the gradients of `loss`")


def grasp(loss: Callable[..., Any], params: Any, *batch: Any, stacked: trees.Stacked = None) -> Any:
    """Returns GraSP scores, `w * (H g)`: how much gradient flow is lost by removing a weight.

    `g` is the gradient of the loss and `H` its Hessian. The squared size of the gradient, `g.g`,
    measures how fast a small step reduces the loss. Shrinking a weight by a share `e` changes it by
    `-2 e w (H g)` to first order. A weight with a positive score carries gradient flow. A weight
    with a negative score reduces it, so removing the weight raises the flow; the lowest scores are
    pruned first. In the paper's notation, the weights with the highest `S(-w) = -w * (H g)` are
    removed.

    The paper uses about ten images of each class, and logits divided by a temperature of 200 inside
    the loss, which makes the classes nearly equally probable.

    Differs from the paper: gradient and Hessian cover all floating-point leaves, whereas the
    authors' code differentiates kernels only; to do the same, close over the rest in `loss`. Scores
    are divided by `sum |w * (H g)| + 1e-10`; the authors' code divides by the absolute value of
    the sum, in which scores cancel. The ranking is the same. `H g` is a forward derivative of the
    gradient (`jax.jvp` of `jax.grad`), so `loss` must not contain a `jax.custom_vjp`.

    Args:
        loss: function `(params, *batch) -> scalar`, the mean over the batch.
        params: tree of arrays, new and dense.
        *batch: the other arguments of the loss.
        stacked: function `(path, leaf) -> axis, tuple of axes, or None`, the axes that number
            copies of a layer, as in a scan. It does not change the scores; warnings name each copy
            separately.

    Returns:
        Tree of float32 arrays like `params`, of both signs; the absolute values add up to 1.

    Raises:
        ValueError: if no leaf is floating point or a leaf is not an array; if the loss is not a
            scalar; unless traced, if scores are not finite (each such leaf is named) or all are 0,
            as for a loss that is linear in the parameters.

    Warns:
        UserWarning: unless traced, if all scores of a kernel, or of one copy of it, are 0
            although its weights are not.

    References:
        Wang, Zhang, Grosse. Picking winning tickets before training by preserving gradient flow.
        arXiv:2002.07376.

    Example:
        >>> loss = lambda w: jnp.sum(jnp.array([1.0, 3.0]) * w**2) / 2 + w[0]
        >>> grasp(loss, jnp.array([-2.0, 1.0])).tolist()  # g = (-1, 3), H g = (-1, 9)
        [0.18..., 0.81...]
    """
    flags = _floating(params)
    weights = trees.pick(params, flags)
    gradient = jax.grad(_of_weights(loss, params, flags, batch))
    _, curved = jax.jvp(gradient, (weights,), (gradient(weights),))
    products = [_product(w, h) for w, h in zip(weights, curved, strict=True)]
    source = "the gradients of `loss` or their derivatives"
    return _as_scores(params, flags, products, stacked, source, _GRASP_EPSILON)


def synflow(
    apply: Callable[[Any, Any], Any],
    params: Any,
    shape_or_input: Any,
    *,
    stacked: trees.Stacked = None,
) -> Any:
    """Returns SynFlow scores: how much of the signal passes through a weight, without any data.

    With all parameters replaced by their absolute values and an input of ones,
    `R = sum(apply(|w|, 1))`, and the score is `|w| * dR/d|w|`. In a network of linear and ReLU
    layers without biases and skips, the scores of each layer have the same sum: a weight in a small
    layer scores higher, and the scores of a layer rise as it shrinks. Therefore no layer vanishes
    if the network is pruned in many small rounds, each with new scores; pruning in one step does
    not ensure this. The paper uses 100 rounds, the default of `prune_in_rounds`. Under `jax.jit`
    all rounds share one compilation.

    Differs from the paper: the score is that of `log R`, `|w| * (dR/d|w|) / |R|`. The ranking is
    the same, and the backward pass stays in range if the forward pass does. The scores are then
    divided by their sum. Values that are not in `params` do not change, whereas the authors' code
    also takes the absolute value of running means. `apply` must use running statistics in
    normalisation (`model.eval()`): the statistics of a batch of ones would cancel the signal.

    `R` grows by a factor of about `0.8 * sqrt(2 * inputs)` with each layer that starts from He's
    normal distribution: it is 1e22 in a ResNet-20 and 1e68 in a ResNet-50, which is too large for
    float32 and raises an error. In that case scale the input inside `apply`,
    `lambda p, x: apply(p, 1e-34 * x)`: if biases and running means are 0, as in a new network, all
    activations shrink by the same factor and no score changes. Or compute in float64.

    Args:
        apply: function `(params, x) -> outputs`, an array or a tree of arrays.
        params: tree of arrays; weights pruned so far are zeros.
        shape_or_input: shape of the input with a batch dimension of 1, such as `(1, 32, 32, 3)`;
            or an array, a `jax.ShapeDtypeStruct` or a tree of these, of which only shape and
            dtype are used. An input without a floating-point dtype gets that of the parameters.
        stacked: function `(path, leaf) -> axis, tuple of axes, or None`, the axes that number
            copies of a layer, as in a scan. It does not change the scores; warnings name each copy
            separately.

    Returns:
        Tree of float32 arrays like `params`; the scores add up to 1.

    Raises:
        ValueError: if no leaf is floating point or a leaf is not an array; if an input has no
            shape; if no output is floating point; unless traced, if the size of `R` is not between
            a thousand times the smallest and a thousandth of the largest number of its dtype, a
            score is not finite, or all are 0. If traced, all scores are NaN in the first case.

    Warns:
        UserWarning: unless traced, if all scores of a kernel, or of one copy of it, are 0
            although its weights are not.

    References:
        Tanaka, Kunin, Yamins, Ganguli. Pruning neural networks without any data by iteratively
        conserving synaptic flow. arXiv:2006.05467.

    Example:
        >>> apply = lambda w, x: jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> params = {"in": jnp.array([[1.0, -3.0]]), "out": jnp.array([[-2.0], [2.0]])}
        >>> scores = synflow(apply, params, (1, 1))
        >>> scores["in"].tolist(), scores["out"].tolist()  # R = 1 * 2 + 3 * 2
        ([[0.125, 0.375]], [[0.125], [0.375]])
        >>> import jaxprune
        >>> score = jax.jit(lambda p: synflow(apply, p, (1, 1)))
        >>> pruned, masks = jaxprune.prune_in_rounds(params, 0.5, score, rounds=2)
        >>> pruned["in"].tolist(), pruned["out"].tolist()
        ([[0.0, -3.0]], [[0.0], [2.0]])
    """
    flags = _floating(params)
    weights = [jnp.abs(jnp.asarray(leaf)) for leaf in trees.pick(params, flags)]
    ones = _ones(shape_or_input, _common(weights))
    total, pull = jax.vjp(lambda w: _total(apply(trees.put(params, flags, w), ones)), weights)
    size, (low, high) = jnp.abs(total), _signal_range(total.dtype)
    if not isinstance(size, jax.core.Tracer):
        _check_signal(float(size), low, high)
    # The derivative of log R: its backward pass stays in range if the forward pass does.
    (slopes,) = pull(jnp.where((size >= low) & (size <= high), 1 / size, jnp.nan))
    products = [_product(w, slope) for w, slope in zip(weights, slopes, strict=True)]
    return _as_scores(params, flags, products, stacked, "the derivatives of `apply`")


def _floating(params: Any) -> tuple[bool, ...]:
    """Returns which leaves are floating point; raises if none is, or if a leaf is not an array."""
    named = trees.leaves_with_paths(params)
    trees.raise_for(
        [f"{path}: {type(leaf).__name__}" for path, leaf in named if not _is_array(leaf)],
        "`params` must hold arrays only; remove all other leaves (`nnx.split`, "
        "`equinox.partition`):",
    )
    dtypes = [jnp.result_type(leaf) for _, leaf in named]
    flags = tuple(bool(jnp.issubdtype(dtype, jnp.floating)) for dtype in dtypes)
    if not any(flags):
        seen = [f"{path}: {dtype}" for (path, _), dtype in zip(named[:8], dtypes)]
        trees.raise_for(seen or ["no leaves"], "`params` must have a floating-point leaf, but has:")
    return flags


def _is_array(leaf: Any) -> bool:
    """Returns whether a leaf is a JAX or NumPy array, or a number."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int | complex)


def _of_weights(
    loss: Callable[..., Any], params: Any, flags: tuple[bool, ...], batch: tuple[Any, ...]
) -> Callable[[list[Any]], jax.Array]:
    """Returns the loss as a function of the floating-point leaves; raises if it is not a scalar."""

    def of_weights(weights: list[Any]) -> jax.Array:
        value = loss(trees.put(params, flags, weights), *batch)
        if not _is_array(value):
            seen = f"a value of type {type(value).__name__}"
        elif jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            seen = f"shape {jnp.shape(value)}, dtype {jnp.result_type(value)}"
        else:
            return jnp.asarray(value)
        raise ValueError(
            f"`loss` must return one floating-point number, but returned {seen}. Return the mean "
            "over the batch, without auxiliary outputs."
        )

    return of_weights


def _wide(dtype: Any) -> Any:
    """Returns float32, or the type itself if it is wider; JAX promotes no type of 8 bits."""
    return dtype if jnp.dtype(dtype).itemsize > 4 else jnp.dtype(jnp.float32)


def _common(arrays: list[jax.Array]) -> Any:
    """Returns the type that arrays have together; float32 if types of 8 bits are mixed with it."""
    kinds = {x.dtype for x in arrays}
    return kinds.pop() if len(kinds) == 1 else jnp.result_type(*map(_wide, kinds))


def _product(weight: Any, slope: jax.Array) -> jax.Array:
    """Computes `weight * slope` in float32 or wider."""
    dtype = _wide(slope.dtype)
    return jnp.asarray(weight, dtype) * slope.astype(dtype)


def _as_scores(
    params: Any,
    flags: tuple[bool, ...],
    products: Sequence[jax.Array],
    stacked: trees.Stacked,
    source: str,
    epsilon: float = 0.0,
) -> Any:
    """Divides by the sum of absolute values, checks unless traced, and adds the other leaves."""
    total = sum(jnp.sum(jnp.abs(x)) for x in products) + epsilon
    total = jnp.where(total > 0, total, 1)
    scores = [(x / total).astype(jnp.float32) for x in products]
    if not any(isinstance(x, jax.core.Tracer) for x in scores):
        named = trees.leaves_with_paths(params)
        own = [pair for pair, flag in zip(named, flags) if flag]
        _check_scores(own, scores, [trees.stacked_axes(*pair, stacked) for pair in own], source)
    leaves, treedef = jax.tree.flatten(params)
    new = iter(scores)
    return treedef.unflatten(
        next(new) if flag else jnp.zeros(jnp.shape(leaf), jnp.float32)
        for leaf, flag in zip(leaves, flags, strict=True)
    )


def _check_scores(
    named: list[tuple[str, Any]],
    scores: list[jax.Array],
    copies: list[tuple[int, ...]],
    source: str,
) -> None:
    """Raises for scores that are not finite or all 0; warns of kernels whose scores are all 0."""
    rest = [
        tuple(axis for axis in range(score.ndim) if axis not in axes)
        for score, axes in zip(scores, copies, strict=True)
    ]
    bad, seen, alive = jax.device_get(
        [
            [jnp.sum(~jnp.isfinite(score)) for score in scores],
            [jnp.any(score != 0, axis=axes) for score, axes in zip(scores, rest)],
            [jnp.any(jnp.asarray(leaf) != 0, axis=axes) for (_, leaf), axes in zip(named, rest)],
        ]
    )
    trees.raise_for(
        [f"{path}: {n} of {jnp.size(leaf)}" for (path, leaf), n in zip(named, bad) if n],
        f"scores must be finite, but {source} are not, or their products with the weights overflow "
        "float32; look for NaN in the input, and scale down large values. Not finite are:",
    )
    if not any(np.any(found) for found in seen):
        raise ValueError(
            f"scores rank nothing: all are 0, because {source} are 0 or underflow wherever a "
            "weight is not 0. Look for a layer that passes no signal, or scale up small values."
        )
    silent = [
        f"{path}[{', '.join(map(str, copy))}]" if copy else path
        for (path, _), axes, has_score, has_weight in zip(named, rest, seen, alive)
        for copy in np.argwhere(has_weight & ~has_score).tolist()
        if len(axes) >= 2
    ]
    if silent:
        warnings.warn(
            f"all scores are 0 in {', '.join(silent)}: no signal passes through, because a scale "
            "starts at 0 or a layer was pruned away. Score parameters in which such scales are 1.",
            stacklevel=4,
        )


def _ones(shape_or_input: Any, dtype: Any) -> Any:
    """Returns an input of ones for a shape, or for a tree of objects with shapes."""
    if isinstance(shape_or_input, tuple | list) and all(isinstance(n, int) for n in shape_or_input):
        return jnp.ones(tuple(shape_or_input), dtype)
    named = trees.leaves_with_paths(shape_or_input)
    trees.raise_for(
        [f"{path or 'input'}: {type(x).__name__}" for path, x in named if not hasattr(x, "shape")],
        "`shape_or_input` must be a shape such as (1, 32, 32, 3), or have leaves with a shape:",
    )

    def ones(x: Any) -> jax.Array:
        return jnp.ones(x.shape, x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else dtype)

    return jax.tree.map(ones, shape_or_input)


def _total(outputs: Any) -> jax.Array:
    """Sums all floating-point outputs in float32 or wider."""
    leaves = jax.tree.leaves(outputs)
    floating = [x for x in leaves if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    if not floating:
        seen = [str(jnp.result_type(x)) for x in leaves]
        raise ValueError(f"`apply` must return a floating-point output, but returned {seen}.")
    sums = [jnp.sum(x.astype(_wide(x.dtype))) for x in floating]
    return sum(sums[1:], sums[0])


def _signal_range(dtype: Any) -> tuple[float, float]:
    """Returns the range of sizes of R in which derivatives are exact enough to be ranked."""
    # With R at a thousandth of the largest number, scores of a ResNet-50 are accurate to 1e-3.
    limits = jnp.finfo(dtype)
    return 1e3 * float(limits.tiny), 1e-3 * float(limits.max)


def _check_signal(size: float, low: float, high: float) -> None:
    """Raises unless R is in range; NaN is not in range."""
    if not low <= size <= high:
        raise ValueError(
            "the signal through the network, R = sum(apply(|params|, ones)), must have a size "
            f"between {low:.1e} and {high:.1e}, but has {size:.1e}. If pruning left a path open "
            "and no parameter is NaN, the network is too deep for its dtype: scale the input "
            "inside `apply`, as in `lambda p, x: apply(p, 1e-30 * x)`, or compute in float64 "
            "(`with jax.enable_x64(True):`; parameters, input and network in float64)."
        )
