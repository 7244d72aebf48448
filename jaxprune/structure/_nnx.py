"""Turns a Flax NNX module into pure functions of its variables, and back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax
from flax import nnx

from jaxprune import trees
from jaxprune.structure._groups import Groups
from jaxprune.structure._optimizer import CompactedState, sliced_state
from jaxprune.structure._plans import Plan
from jaxprune.structure._traces import Trace


class FromNNX(NamedTuple):
    """A module as variables and pure functions, from `from_nnx`.

    Example:
        >>> FromNNX._fields
        ('variables', 'evaluate', 'train', 'merge')
    """

    variables: dict[str, Any]  # trees under "params", "cache" and "state", where not empty
    evaluate: Callable[..., Any]  # (variables, *args, **kwargs) -> output
    train: Callable[..., Any]  # (the same) -> (output, new values of cache and state)
    merge: Callable[[Any], Any]  # variables -> module, without any check of shapes

    def traces(self, *args: Any, **kwargs: Any) -> list[Trace]:
        """Makes the traces of evaluation and training, for `find_groups`."""
        return [
            Trace(self.evaluate, args, kwargs=kwargs),
            Trace(self.train, args, lambda output: output[1], kwargs=kwargs),
        ]

    def is_parameter(self, path: str, leaf: Any) -> bool:
        """Tells whether a leaf is an `nnx.Param`, for `find_groups(parameters=...)`."""
        del leaf
        return path.startswith("params/")

    def module(self, plan: Plan, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Builds the module with compacted arrays, if it then computes the same as the plan.

        Its attributes, such as `out_features`, keep their dense values. Only evaluation is
        compared, as dropout draws different bits at a different width.

        Args:
            plan: from the groups of `traces`.
            variables: dense or compacted arrays.
            *args: arguments of the module.
            **kwargs: its keyword arguments.

        Returns:
            An NNX module in evaluation mode.

        Raises:
            ValueError: if the module computes something different on the compacted arrays; it says
                where.
        """
        fit = plan.fits(self.evaluate, variables, *args, **kwargs)
        trees.raise_for(
            [] if fit else list(fit.reasons),
            "the module must compute the same on smaller arrays as the dense one with zeros, but "
            "reads widths from its arrays; use `plan.wrap(function)` instead. It differs here:",
        )
        dense = {path: leaf.shape for path, leaf in trees.leaf_by_path(variables).items()}
        module = self.merge(plan.compact(variables) if dense == plan.model.shapes else variables)
        module.eval()
        return module

    def optimizer(
        self,
        plan: Plan,
        optimizer: nnx.Optimizer,
        module: Any,
        *,
        tx: optax.GradientTransformation | None = None,
        groups: Groups | None = None,
    ) -> CompactedState:
        """Builds the optimizer of a smaller module, with the state of the dense one.

        Args:
            plan: from the groups of `traces`.
            optimizer: the optimizer of the dense module; it is not changed.
            module: the smaller module, from `module`.
            tx: the transformation that continues; None is that of `optimizer`. It must differ if
                it depends on the remaining channels (`agip_transform` with `groups`).
            groups: as for `compact_state`.

        Returns:
            A `CompactedState`: an `nnx.Optimizer`, and the paths in its state of what could not be
            sliced and was initialised anew.

        Raises:
            ValueError: as `compact_state`.
        """
        small = nnx.Optimizer(module, optimizer.tx if tx is None else tx, wrt=optimizer.wrt)
        params = trees.leaf_by_path(nnx.state(module, optimizer.wrt))
        shapes = plan.model.shapes
        kept = {path: plan.shape(path) for path in shapes}
        trees.raise_for(
            [
                f"{path}: shape {leaf.shape}, in the plan {kept.get(f'params/{path}', 'missing')}"
                for path, leaf in params.items()
                if kept.get(f"params/{path}") != leaf.shape
            ],
            "`module` must be the smaller module that `FromNNX.module` makes with this plan:",
        )
        dense = {path: shapes[f"params/{path}"] for path in params}
        state, restarted = sliced_state(
            plan, optimizer.opt_state, small.opt_state, dense, "params/", groups
        )
        nnx.update(small.opt_state, nnx.state(state))
        small.step.set_value(optimizer.step.get_value())
        return CompactedState(small, restarted)


def from_nnx(
    module: Any,
    call: Callable[..., Any] = lambda module, *args, **kwargs: module(*args, **kwargs),
    *,
    state: str = "state",
) -> FromNNX:
    """Splits a module into variables and pure functions, ready for `find_groups`.

    Args:
        module: an `nnx.Module`; it is not changed.
        call: `call(module, *args, **kwargs)` applies the module; give a different one to use a
            different method with the same variables.
        state: the key of what is neither a parameter nor a cache, such as running statistics.

    Returns:
        The variables, the functions, and the way back, as `FromNNX`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.structure import find_groups
        >>> model = nnx.Sequential(
        ...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> pure, x = from_nnx(model), jnp.ones((1, 3))
        >>> groups = find_groups(pure.traces(x), pure.variables, parameters=pure.is_parameter)
        >>> plan = groups.plan({"params/layers/0/kernel:1": jnp.arange(8) < 5})
        >>> pure.module(plan, pure.variables, x).layers[0].kernel.shape
        (3, 5)
    """
    graphdef, *states = nnx.split(module, nnx.Param, nnx.Cache, ...)
    names = "params", "cache", state
    named = zip(names, map(nnx.to_pure_dict, states), strict=True)
    variables = {name: own for name, own in named if own}

    def merge(variables: Any) -> Any:
        parts = [variables.get(name, {}) for name in names]
        return nnx.merge(graphdef, *parts)

    def evaluate(variables: Any, *args: Any, **kwargs: Any) -> Any:
        own = merge(variables)
        own.eval()
        return call(own, *args, **kwargs)

    def train(variables: Any, *args: Any, **kwargs: Any) -> Any:
        own = merge(variables)
        own.train()
        output = call(own, *args, **kwargs)
        _, _, cache, rest = nnx.split(own, nnx.Param, nnx.Cache, ...)
        new = {"cache": nnx.to_pure_dict(cache), state: nnx.to_pure_dict(rest)}
        return output, {name: own for name, own in new.items() if name in variables}

    return FromNNX(variables, evaluate, train, merge)
