"""Batch statistics of sub-networks, and their accuracy with these."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxprune import training
from jaxprune.elastic._programs import resized
from jaxprune.elastic._space import Choice

PyTree = Any


class Masked(Protocol):
    """What is needed of a space: gates of a choice, and functions that take them."""

    def gates(self, choice: Choice) -> PyTree:
        """Returns small arrays that say what a choice keeps."""
        ...

    def resolution(self, choice: Choice) -> int | None:
        """Returns the height and width of the images, or None if they do not vary."""
        ...

    def masked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `(variables, gates, *args) -> output`, one program for all choices."""
        ...


class _Gated(NamedTuple):
    """A masked function of variables and one batch; two of the same function are equal.

    So JAX compiles it once, however often it is made.
    """

    function: Callable[..., Any]

    def __call__(self, variables: PyTree, batch: Any) -> Any:
        gates, images = batch
        return self.function(variables, gates, images)


def recalibrate(
    train: Callable[..., tuple[Any, PyTree]],
    variables: PyTree,
    gates: PyTree,
    batches: Iterable[Any],
    *,
    decays: Mapping[str, float] | None = None,
) -> PyTree:
    """Computes the batch statistics of one sub-network again.

    The running statistics of an elastic network are those of no sub-network: each one sends other
    values through its norm layers. They are replaced by the statistics of the given batches, all
    counted as one large batch; see `training.measure_statistics` with `mean_of`. For a network that
    was compacted or extracted, call that function.

    Args:
        train: `(variables, gates, images) -> (output, updates)` in training mode, made by
            `space.masked`. It is compiled once for all choices.
        variables: of the elastic network.
        gates: from `space.gates`.
        batches: arrays of training images [N, ...]. The published code takes 2,000 images in
            batches of 200.
        decays: from `training.find_decays`, to save three calls of `train`.

    Returns:
        `variables` with the statistics of the sub-network. Parameters do not change.

    Raises:
        ValueError: if the network has no batch normalization, or there is no batch.

    References:
        Cai et al., Once-for-all, ICLR 2020, arXiv:1908.09791, and its code.

    Example:
        >>> def train(variables, gate, x):
        ...     old, x = variables["stats"], gate * x
        ...     mean, var = (0.9 * old[k] + 0.1 * getattr(x, k)() for k in ("mean", "var"))
        ...     return x, {"stats": {"mean": mean, "var": var}}
        >>> variables = {"stats": {"mean": jnp.zeros(()), "var": jnp.ones(())}}
        >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
        >>> found = recalibrate(train, variables, 0.5, batches)["stats"]
        >>> print(f"{found['mean']:.2f} {found['var']:.2f}")
        2.00 1.25
    """
    return training.measure_statistics(
        _Gated(train),
        variables,
        ((gates, images) for images in batches),
        mean_of=training.mean_beside,
        weight=lambda batch: len(batch[1]),
        decays=decays,
    )


def make_accuracy(
    space: Masked,
    train: Callable[..., tuple[Any, PyTree]],
    evaluate: Callable[..., Any],
    variables: PyTree,
    *,
    calibration: Sequence[Any],
    batches: Sequence[tuple[Any, Any]],
) -> Callable[[Choice], float]:
    """Makes a function from a choice to the accuracy of its sub-network, as cut.

    Statistics are computed again for each choice. Two programs serve all choices of a resolution.

    Args:
        space: of the elastic network.
        train: `(variables, images) -> (output, updates)`, such as `functions.train`.
        evaluate: `(variables, images) -> logits [N, classes]`.
        variables: of the elastic network.
        calibration: batches of training images [N, ...], for the statistics.
        batches: pairs of held-out images [N, ...] and labels int [N].

    Returns:
        The function: the fraction of correct answers, exact.

    Raises:
        ValueError: if the network has no batch normalization, or there is nothing to evaluate on.

    Example:
        >>> class Whole:  # a space of one choice
        ...     def gates(self, choice): return ()
        ...     def resolution(self, choice): return None
        ...     def masked(self, function): return lambda v, gates, x: function(v, x)
        >>> def train(variables, x):
        ...     old, x = variables["stats"], x @ variables["params"]
        ...     mean = 0.9 * old["mean"] + 0.1 * x.mean(0)
        ...     return x, {"stats": {"mean": mean}}
        >>> def evaluate(variables, x):
        ...     return x @ variables["params"] - variables["stats"]["mean"][None]
        >>> variables = {"params": jnp.eye(2), "stats": {"mean": jnp.array([9.0, 0.0])}}
        >>> images, labels = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
        >>> own = {"calibration": [images], "batches": [(images, labels)]}
        >>> make_accuracy(Whole(), train, evaluate, variables, **own)(())
        1.0
    """
    if not batches:
        raise ValueError("`batches` must hold at least one pair of images and labels; got none")
    if not calibration:
        raise ValueError("`calibration` must hold at least one batch of images; got none")
    masked_train, masked = space.masked(train), space.masked(evaluate)
    count = sum(len(labels) for _, labels in batches)
    decays: dict[str, float] = {}

    @jax.jit
    def correct(variables: PyTree, gates: PyTree, images: Any, labels: Any) -> jax.Array:
        found = jnp.argmax(masked(variables, gates, images), -1)
        return jnp.sum(found == labels, dtype=jnp.int32)

    def accuracy(choice: Choice) -> float:
        gates, pixels = space.gates(choice), space.resolution(choice)
        images = [resized(own, pixels) for own in calibration]
        if not decays:  # the same for all choices
            decays.update(training.find_decays(_Gated(masked_train), variables, (gates, images[0])))
        own = recalibrate(masked_train, variables, gates, images, decays=decays)
        right = (correct(own, gates, resized(x, pixels), labels) for x, labels in batches)
        return sum(map(int, right)) / count

    return accuracy
