"""Cuts a sub-network out of an elastic network."""

from typing import Any, NamedTuple

import jax

from jaxprune import structure, trees
from jaxprune.elastic._gates import Space
from jaxprune.elastic._kernels import cropped
from jaxprune.elastic._space import Choice, canonical, describe


class Extracted(NamedTuple):
    """A sub-network on its own, from `extract`.

    Example:
        >>> Extracted._fields
        ('choice', 'description', 'plan', 'variables', 'windows', 'resolution')
    """

    choice: Choice
    description: dict[str, int]  # name of a decision -> chosen option
    plan: structure.Plan  # which channels and blocks are kept
    # Smaller arrays. Small kernels lie in the centre of large ones, as `plan.wrap` needs them.
    variables: Any
    windows: dict[str, int]  # path of a kernel -> its window
    resolution: int | None  # pixels, if it varies

    def crop(self) -> Any:
        """Returns the variables with small kernels, for a function that pads by their size.

        Such a function has `padding="SAME"` or pads by half a window.

        Returns:
            The tree with kernels [window, window, in, out].
        """

        def crop(path: Any, leaf: Any) -> Any:
            name = trees.path_string(path)
            return cropped(leaf, self.windows[name]) if name in self.windows else leaf

        return jax.tree.map_with_path(crop, self.variables)


def extract(space: Space, variables: Any, choice: Choice) -> Extracted:
    """Cuts out a sub-network: smaller arrays that compute what the masked network computes.

    Run them with `jax.jit(extracted.plan.wrap(space.evaluate))(extracted.variables, inputs)`, or as
    a plain module with `to_module`. Running statistics are those of `variables`; measure them again
    before the network is judged.

    Args:
        space: the elastic network.
        variables: its arrays, such as trained ones.
        choice: one index for each decision.

    Returns:
        An `Extracted`.

    Raises:
        ValueError: if the choice is outside of the space, or the variables belong to a different
            network.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxprune.elastic import make_space
        >>> def mlp(w, x):
        ...     return jax.nn.relu(x @ w["in"]) @ w["out"]
        >>> w = {"in": jnp.ones((1, 4)), "out": jnp.ones((4, 2))}
        >>> groups = structure.find_groups(mlp, w, jnp.ones((1, 1)))
        >>> space = make_space(groups, w, mlp, widths={"in:1": (2, 4)})
        >>> small = extract(space, w, (0,))
        >>> small.variables["out"].shape, small.description
        ((2, 2), {'in:1': 2})
        >>> small.plan.wrap(mlp)(small.variables, jnp.ones((1, 1))).tolist()
        [[2.0, 2.0]]
    """
    choice = canonical(space.decisions, choice)
    plan = space.plan(choice)
    baked = jax.jit(space.mask)(variables, space.gates(choice)) if space.windows(choice) else None
    small = plan.compact(variables if baked is None else baked)
    windows = {path: own for path, own in space.windows(choice).items() if path in plan.shapes}
    description = describe(space.decisions, choice)
    return Extracted(choice, description, plan, small, windows, space.resolution(choice))


def to_module(space: Space, extracted: Extracted) -> Any:
    """Builds a sub-network as a plain module of `models`, with its widths, depths and windows.

    Args:
        space: from `elastic.named`.
        extracted: from `extract`.

    Returns:
        An NNX module in evaluation mode that computes the same, to rounding, without any plan.

    Raises:
        ValueError: if the space is not one of `elastic.named`.

    Example:
        >>> from jaxprune.elastic import named, smallest
        >>> space = named("resnet8", image_size=8)
        >>> choice = smallest(space.decisions)
        >>> model = to_module(space, extract(space, space.variables, choice))
        >>> model.widths.blocks
        ((8, 16), (16, 32), (32, 64))
    """
    if space.build is None:
        raise ValueError(
            "`space` must be one of `elastic.named`, whose networks jaxprune can build; run others "
            "with `extracted.plan.wrap(function)`."
        )
    return space.build(extracted)
