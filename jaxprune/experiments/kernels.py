"""Sparse kernels in a run: the wrapped network, and steps that follow its masks."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

import jaxprune
from jaxprune import kernels, processes, training
from jaxprune.experiments.pruning import AT_INIT

if TYPE_CHECKING:
    from jaxprune.experiments.experiment import Experiment


def wrap_network(
    function: Callable[..., Any],
    variables: Any,
    tx: optax.GradientTransformation,
    inputs: jax.ShapeDtypeStruct,
) -> kernels.Wrapped:
    """Wraps the network of a run, of which nothing is pruned yet.

    Args:
        function: `function(variables, inputs)`.
        variables: types of the variables, `{"params": ..., "model_state": ...}`.
        tx: the optimizer, whose masks say which leaves may be pruned.
        inputs: type of a micro-batch; what pays depends on its size.

    Returns:
        The wrapped function.
    """
    masks = jax.eval_shape(lambda p: jaxprune.get_masks(tx.init(p)), variables["params"])
    full = jax.tree.map(lambda mask: np.ones(mask.shape, bool), masks)
    return kernels.wrap(function, as_masks(full, variables), variables, inputs)


def as_masks(masks: Any, variables: Any) -> dict[str, Any]:
    """Returns masks of parameters as those of the variables of a network."""
    return {name: True for name in variables} | {"params": masks}


class SparseSteps:
    """Runs the steps of a training one by one, each with the indices that are due.

    Args:
        experiment: the run.
        wrapped: the network, from `wrap_network`.
        record: from `to_record`, to resume.
    """

    def __init__(
        self,
        experiment: "Experiment",
        wrapped: kernels.Wrapped,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Knows the steps of the mask updates; `begin` reads the first masks."""
        changes = experiment.config.method not in AT_INIT
        names = experiment.functions.variables

        def under(masks: Any) -> dict[str, Any]:
            return as_masks(masks, names)

        updates = experiment.window.updates if changes else ()
        self._following = kernels.Following(wrapped, updates, under=under, record=record)
        self._step = 0

    def begin(self, state: training.TrainState) -> None:
        """Reads the masks of a state."""
        self._step = int(state.step)
        self._following.read(state.opt_state)
        self._say()

    def follow(self, wrapped: kernels.Wrapped, state: training.TrainState) -> None:
        """Goes on with the network of another stage, whose layers are chosen anew."""
        self._following.wrapped = wrapped
        self.begin(state)

    def run(self, run: Callable[..., tuple], *args: Any) -> tuple[training.TrainState, Any]:
        """Runs one step, `run(*args, indices=...)`."""
        state, metrics = run(*args, indices=self._following.indices(self._step))
        before = self._following.wrapped.capacities
        self._following.after(self._step, state.opt_state)
        self._step += 1
        if self._following.wrapped.capacities != before:
            self._say()
        return state, metrics

    def is_dense(self) -> bool:
        """Tells whether the next step uses no sparse kernel."""
        return not self._following.indices(self._step)

    def to_record(self) -> dict[str, Any]:
        """Returns what a checkpoint says of the kernels."""
        return self._following.to_record()

    def to_dict(self) -> dict[str, Any]:
        """Returns the kernel of each layer, for summary.json."""
        return self._following.wrapped.to_dict()

    def _say(self) -> None:
        """Prints which layers have sparse kernels."""
        processes.say(f"step {self._step}: {self._following.wrapped}")
