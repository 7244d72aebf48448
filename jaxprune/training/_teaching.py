"""Losses that teach a pruned network what the dense one computes."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import trees


def distillation(
    logits: jax.Array, teacher: jax.Array, *, temperature: float = 1.0, axis: int = -1
) -> jax.Array:
    """Computes how far predictions are from those of a teacher: `T ** 2 * KL(teacher || student)`.

    No labels are needed. The teacher gets no gradient.

    Args:
        logits: floating [..., classes], of the pruned network.
        teacher: floating, like `logits`, of the dense network on the same inputs.
        temperature: T, at least 1e-3; both sides are softened by it. The factor keeps the size of
            the gradient.
        axis: the axis of the classes.

    Returns:
        float32, the shape of `logits` without the axis, in nats; 0 where the predictions are equal.

    Raises:
        ValueError: if the shapes differ, or `temperature` is out of range.

    References:
        Hinton, Vinyals, Dean. Distilling the knowledge in a neural network. arXiv:1503.02531.

    Example:
        >>> loss = distillation(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0]]))
        >>> print(f"{loss[0]:.4f}")
        0.1109
    """
    if logits.shape != teacher.shape:
        raise ValueError(
            f"`logits` {logits.shape} and `teacher` {teacher.shape} must have the same shape."
        )
    if not temperature >= 1e-3:
        raise ValueError(f"`temperature` must be at least 1e-3; got {temperature}.")
    softened = (x.astype(jnp.float32) / temperature for x in (logits, teacher))
    student, target = (jax.nn.log_softmax(x, axis=axis) for x in softened)
    target = jax.lax.stop_gradient(target)
    return temperature**2 * jnp.sum(jnp.exp(target) * (target - student), axis=axis)


def hidden_distance(states: Any, teacher: Any) -> jax.Array:
    """Computes how far hidden states are from those of a teacher, relative to their size.

    Args:
        states: tree of floating arrays of the pruned network. Where it has lost channels, compare
            states that have not, such as the residual stream.
        teacher: tree like `states`, of the dense network; it gets no gradient.

    Returns:
        float32 [], the mean over leaves of `||states - teacher||^2 / ||teacher||^2`.

    Raises:
        ValueError: if paths or shapes differ, listing every leaf that does.

    References:
        Jiao et al. TinyBERT. arXiv:1909.10351.
        Muralidharan et al. Compact language models via pruning and knowledge distillation.
        arXiv:2407.14679.

    Example:
        >>> float(hidden_distance([jnp.array([1.0, 0.0])], [jnp.array([2.0, 0.0])]))
        0.25
    """
    trees.check_same_structure("states", states, teacher)
    by_path = trees.leaf_by_path(teacher)

    def distance(own: jax.Array, wanted: jax.Array) -> jax.Array:
        wanted = jax.lax.stop_gradient(wanted.astype(jnp.float32))
        size = jnp.maximum(jnp.sum(wanted**2), jnp.finfo(jnp.float32).tiny)
        return jnp.sum((own.astype(jnp.float32) - wanted) ** 2) / size

    own = trees.leaf_by_path(states)
    return jnp.mean(jnp.stack([distance(leaf, by_path[path]) for path, leaf in own.items()]))
