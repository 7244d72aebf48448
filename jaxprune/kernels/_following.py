"""Follows the masks of a training: dense steps at mask updates, sparse kernels in between."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxprune import masks, trees
from jaxprune.files import schemas
from jaxprune.kernels._capacities import Capacities
from jaxprune.kernels._wrapping import Wrapped

__all__ = ["Following"]

RECORD = schemas.record(
    {
        "capacities": schemas.table(schemas.whole(low=1)),
        "kept": schemas.whole(),
        "is_due": schemas.flag,
    }
)


class Following:
    """The indices for each step of a training whose masks change while it runs.

    A transformation compares gradients of removed weights at a mask update, and through a sparse
    kernel these are 0. So the step of a mask update computes all products densely
    (`indices={}`), and all other steps the kept weights. That is two programs, and one more for
    each new choice of layers, see `Wrapped.update`. A mask update that was refused, because a
    gradient was not finite, is due again at the next step, which is then dense as well.

    A method that averages gradients between mask updates, as AGIP does for `regrow`, sees 0 for
    removed weights in all steps but these.

    Args:
        wrapped: from `wrap`, for the masks at the first step.
        updates: the steps of the mask updates, counted from 0, such as
            `schedules.mask_update_steps(start, stop, every)`.
        under: function from the masks of a state to those of the first argument of the function,
            such as `lambda masks: {"params": masks, "batch_stats": True}`. Default: the same.
        record: from `to_record`, to resume with the same layers and capacities.

    Raises:
        ValueError: if `record` is damaged.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune import kernels
        >>> masks = {"w": jnp.eye(4, dtype=bool)}
        >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
        >>> wrapped = kernels.wrap(lambda p, x: x @ p["w"], masks, params, x, table="always")
        >>> following = Following(wrapped, updates=[0, 10])
        >>> list(following.indices(0)), list(following.indices(1))
        ([], ['w'])
    """

    def __init__(
        self,
        wrapped: Wrapped,
        updates: Iterable[int],
        *,
        under: Callable[[Any], Any] = lambda masks: masks,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts with the masks of `wrapped`; `read` replaces them by those of a state."""
        self.wrapped, self.updates = wrapped, frozenset(updates)
        self._under, self._refused = under, 0
        self._is_due = False  # whether the last mask update was refused, so that it is due again
        self._capacities: Capacities | None = None  # that of the record, until a state is read
        if record is not None:
            RECORD(record, "`record`")
            self._is_due = record["is_due"]
            self._capacities = Capacities(dict(record["capacities"]), record["kept"])

    def is_dense(self, step: int) -> bool:
        """Tells whether a step, counted from 0, must compute all products densely."""
        return step in self.updates or self._is_due

    def indices(self, step: int) -> dict[str, Any]:
        """Returns the argument `indices` of a step, counted from 0."""
        return {} if self.is_dense(step) else self.wrapped.indices

    def after(self, step: int, opt_state: Any) -> None:
        """Reads the masks that a step has left, if it may have changed them.

        Args:
            step: the step that was computed, counted from 0.
            opt_state: the state of the optimizer after it.

        Raises:
            ValueError: if the state holds no masks, or other ones than those of the function.
        """
        if self.is_dense(step):
            self._is_due = _refused(opt_state) > self._refused
            self.read(opt_state)

    def read(self, opt_state: Any) -> None:
        """Reads the masks of a state: that of the first step, or one that was restored.

        Args:
            opt_state: the state of the optimizer.

        Raises:
            ValueError: if the state holds no masks, or other ones than those of the function.
        """
        self._refused = _refused(opt_state)
        own = self._under(jax.device_get(masks.get_masks(opt_state)))
        self.wrapped = self.wrapped.update(own, capacities=self._capacities)
        self._capacities = None

    def to_record(self) -> dict[str, Any]:
        """Returns what a checkpoint needs for the same programs, ready for JSON."""
        own = self.wrapped.capacities
        capacities = dict(own.by_layer)
        return {"capacities": capacities, "kept": own.kept, "is_due": self._is_due}


def _refused(opt_state: Any) -> int:
    """Returns how many due mask updates were refused so far."""
    return sum(map(int, trees.state_fields(opt_state, "refused")))
