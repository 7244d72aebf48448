"""The inputs and outputs of a leaf, which patterns read from layouts."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Unfit(NamedTuple):
    """A rule's answer for a leaf that the pattern does not fit; makes `patterns_of` raise."""

    reason: str


def check_one_way(
    call: str, wanted: str, example: str, axis: int | None, layouts: Mapping[str, Any] | None
) -> None:
    """Raises unless exactly one of `axis` and `layouts` says where inputs or outputs are."""
    if (axis is None) == (layouts is None):
        seen = "neither is" if axis is None else "both are"
        comma = "" if call.endswith("(") else ", "
        raise ValueError(
            f"either `axis` or `layouts` must say which axis of each leaf holds its {wanted}, but "
            f"{seen} given: write `{call}{comma}axis={example})` if all kernels are [..., in, "
            f"out], or `{call}{comma}layouts=jaxprune.layouts.find(function, params, *args))` to "
            "find the axes."
        )


def axes_of(layouts: Mapping[str, Any], path: str, leaf: Any, part: str) -> tuple[int, ...] | Unfit:
    """Returns the input or output axes of a leaf or one copy of it, or why they are not known.

    With `stacked=`, a rule sees a single copy, without the axes that number copies.
    """
    if path not in layouts:
        reason = getattr(layouts, "reason", lambda path: "it is not in `layouts`")(path)
        return Unfit(f"no layout was found: {reason}")
    layout = layouts[path]
    axes = list(range(sum(map(len, layout))))
    if len(leaf.shape) == len(axes) - len(layout.copies):
        axes = [axis for axis in axes if axis not in layout.copies]
    if len(axes) != len(leaf.shape):
        return Unfit(f"its layout has {len(axes)} axes: {layout}")
    found = tuple(axes.index(axis) for axis in getattr(layout, part) if axis in axes)
    return found or Unfit(f"its layout has no {part}: {layout}")
