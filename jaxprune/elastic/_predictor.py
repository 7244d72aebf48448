"""Predicts the accuracy of sub-networks from the choices that were measured."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxprune.elastic._space import Choice, Decision, used

_SHARE = 0.8  # of the pairs that the predictor is fitted to


class Fit(NamedTuple):
    """How a predictor is fitted.

    Example:
        >>> Fit(steps=500).hidden
        (400, 400, 400)
    """

    hidden: tuple[int, ...] = (400, 400, 400)  # widths of the hidden layers
    steps: int = 500
    batch: int = 256  # pairs of a step; all of them if there are fewer
    learning_rate: float = 1e-3  # of AdamW, falls to 0 along a cosine
    weight_decay: float = 1e-2


class Predictor(NamedTuple):
    """A fitted predictor; call it with choices to get their predicted accuracies.

    Example:
        >>> Predictor._fields[-3:]
        ('spearman', 'kendall', 'error')
    """

    decisions: tuple[Decision, ...]
    graph: Any  # nnx.GraphDef of the multi-layer perceptron
    params: Any  # its parameters, float32
    mean: float  # mean of the measured accuracies it was fitted to, added to each output
    scale: float  # their standard deviation, by which each output is multiplied
    unseen: tuple[tuple[float, float], ...]  # predicted and measured accuracy of unseen choices
    spearman: float | None  # rank correlations of these; None if either side is constant
    kendall: float | None
    error: float  # root mean square of predicted - measured over the unseen choices

    def __call__(self, choices: Sequence[Choice]) -> np.ndarray:
        """Returns the predicted accuracy of each choice, float64 [N]."""
        if not choices:
            return np.zeros(0)
        # Rows are filled up to a power of two, so that few programs are compiled.
        size = 1 << (len(choices) - 1).bit_length()
        rows = encode(self.decisions, [*choices, *[choices[-1]] * (size - len(choices))])
        outputs = np.asarray(_apply(self.graph, self.params, rows), np.float64)
        return self.mean + self.scale * outputs[: len(choices)]


class _Network(nnx.Module):
    """A multi-layer perceptron with ReLU: [N, features] -> [N]."""

    def __init__(self, features: int, hidden: Sequence[int], rngs: nnx.Rngs):
        sizes = [features, *hidden, 1]
        self.layers = nnx.List(
            nnx.Linear(*pair, rngs=rngs) for pair in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def __call__(self, rows: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            rows = nnx.relu(layer(rows))
        return self.layers[-1](rows)[:, 0]


def encode(decisions: Sequence[Decision], choices: Sequence[Choice]) -> np.ndarray:
    """Encodes choices for the predictor: one-hot for each decision, zeros in skipped blocks.

    Args:
        decisions: those of the space.
        choices: N choices.

    Returns:
        float32 [N, sum of the numbers of options].

    Raises:
        ValueError: if a choice lies outside the space.

    Example:
        >>> decisions = [Decision("s", "depth", (0, 1)), Decision("w", "width", (4, 8), "s", 0)]
        >>> encode(decisions, [(0, 1), (1, 1)]).tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    """
    starts = np.cumsum([0, *(len(own.options) for own in decisions)])
    rows = np.zeros((len(choices), starts[-1]), np.float32)
    for row, choice in zip(rows, choices, strict=True):
        is_used = np.array(used(decisions, choice), bool)
        row[(starts[:-1] + np.array(choice, int))[is_used]] = 1
    return rows


def fit_predictor(
    decisions: Sequence[Decision],
    choices: Sequence[Choice],
    accuracies: Sequence[float],
    *,
    seed: int = 0,
    settings: Fit | None = None,
) -> Predictor:
    """Fits a predictor to measured choices, and judges it on a fifth that it does not see.

        predicted(choice) = m + s * f(one-hot(choice))

    with m and s the mean and the standard deviation of the accuracies that are fitted, and f a
    multi-layer perceptron of three hidden layers of 400 units. The published predictor has no s; an
    output of unit variance makes the learning rate independent of how much accuracies differ.

    Args:
        decisions: those of the space.
        choices: measured ones, at least 5 that differ.
        accuracies: of each, in [0, 1]; any finite number that is larger for better networks.
        seed: of the split, the initial parameters and the batches.
        settings: see `Fit`, whose defaults are taken if this is None.

    Returns:
        The `Predictor`.

    Raises:
        ValueError: if there are fewer than 5 choices, one is repeated or outside the space, or an
            accuracy is missing or not finite.

    References:
        Cai, Gan, Wang, Zhang, Han. Once-for-all: train one network and specialize it for efficient
        deployment. ICLR 2020, arXiv:1908.09791.

    Example:
        >>> decisions = [Decision(name, "width", (1, 2, 3)) for name in "ab"]
        >>> choices = [(i, j) for i in range(3) for j in range(3)]
        >>> own = Fit(hidden=(16,), steps=200)
        >>> predictor = fit_predictor(decisions, choices, [i + j for i, j in choices], settings=own)
        >>> low, high = predictor([(0, 0), (2, 2)])
        >>> bool(low < high)
        True
    """
    settings = Fit() if settings is None else settings
    values = np.asarray(accuracies, np.float64)
    _check(choices, values)
    rows = encode(decisions, choices)
    order = np.random.default_rng(seed).permutation(len(rows))
    count = min(len(rows) - 2, round(_SHARE * len(rows)))
    seen, unseen = order[:count], order[count:]
    mean, scale = float(values[seen].mean()), float(values[seen].std()) or 1.0
    graph, params = _train(rows[seen], (values[seen] - mean) / scale, seed, settings)
    own = Predictor(tuple(decisions), graph, params, mean, scale, (), None, None, 0.0)
    predicted = own([tuple(choices[i]) for i in unseen])
    return own._replace(
        unseen=tuple(zip(predicted.tolist(), values[unseen].tolist(), strict=True)),
        spearman=spearman(predicted, values[unseen]),
        kendall=kendall(predicted, values[unseen]),
        error=float(np.sqrt(np.mean((predicted - values[unseen]) ** 2))),
    )


def spearman(x: Any, y: Any) -> float | None:
    """Returns Spearman's rank correlation; equal values share the mean of their ranks.

    Args:
        x: N numbers.
        y: N numbers.

    Returns:
        A number in [-1, 1], or None if all numbers of `x` or of `y` are equal.

    Example:
        >>> spearman([1, 2, 3], [10, 30, 20])
        0.5
    """
    ranks = [_ranks(np.asarray(own, np.float64)) for own in (x, y)]
    ranks = [own - own.mean() for own in ranks]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / size) if size else None


def kendall(x: Any, y: Any) -> float | None:
    """Returns Kendall's rank correlation tau-b, which accounts for equal values.

    Args:
        x: N numbers.
        y: N numbers.

    Returns:
        A number in [-1, 1], or None if all numbers of `x` or of `y` are equal.

    Example:
        >>> round(kendall([1, 2, 3], [10, 30, 20]), 3)
        0.333
    """
    signs = [np.sign(np.subtract.outer(*[np.asarray(own, np.float64)] * 2)) for own in (x, y)]
    size = float(np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum()))
    return float((signs[0] * signs[1]).sum() / size) if size else None


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


def _check(choices: Sequence[Choice], values: np.ndarray) -> None:
    if len(choices) != len(values):
        raise ValueError(
            f"`accuracies` must have one number for each choice, but has {len(values)} for "
            f"{len(choices)} choices."
        )
    if len(choices) < 5:
        raise ValueError(
            "`choices` must hold at least 5 choices, of which a part is kept for judging the "
            f"predictor, but holds {len(choices)}; measure more."
        )
    if len({tuple(own) for own in choices}) < len(choices):
        raise ValueError(
            "`choices` must differ, or the predictor would be judged on choices that it has seen; "
            "remove those that are repeated."
        )
    if not np.isfinite(values).all():
        pairs = zip(choices, values.tolist(), strict=True)
        bad = [f"{tuple(own)}: {value}" for own, value in pairs if not np.isfinite(value)]
        raise ValueError("\n  ".join(["`accuracies` must be finite, but are not for", *bad]))


def _train(rows: np.ndarray, targets: np.ndarray, seed: int, settings: Fit) -> Any:
    """Minimizes the mean squared error; all steps run in one compiled loop."""
    network = _Network(rows.shape[1], settings.hidden, nnx.Rngs(seed))
    graph, params = nnx.split(network)
    rates = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    tx = optax.adamw(rates, weight_decay=settings.weight_decay)
    batch = min(settings.batch, len(rows))
    rng = np.random.default_rng((seed, 1))
    picks = np.array([rng.permutation(len(rows))[:batch] for _ in range(settings.steps)], np.int32)

    def step(state: Any, pick: jax.Array) -> tuple[Any, None]:
        params, opt_state = state

        def loss(params: Any) -> jax.Array:
            return jnp.mean((nnx.merge(graph, params)(xs[pick]) - ys[pick]) ** 2)

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    xs, ys = jnp.asarray(rows), jnp.asarray(targets, jnp.float32)
    run = jax.jit(lambda state, picks: jax.lax.scan(step, state, picks)[0])
    return graph, run((params, tx.init(params)), picks)[0]


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: Any, params: Any, rows: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(rows)
