"""Arguments that all searches share."""

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from jaxprune.search._found import Evaluation


class Options(TypedDict, total=False):
    """The keywords of `run` that every search passes on."""

    journal: str | Path | None
    at_once: int
    on_evaluation: Callable[[Evaluation, Evaluation], None] | None


def check_count(name: str, value: int, least: int = 1, why: str = "") -> None:
    """Raises unless a number is a whole one and large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}{why}, but is {value!r}.")
