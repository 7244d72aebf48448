"""Checks of what a file says: small functions that combine to the schema of a whole file.

A schema is a function of a value and the place of the value in its file. It returns nothing, or
raises a ValueError that names the place, the rule and the value.

    PLAN = record({"version": whole(), "order": each(text)})
    PLAN({"version": -1, "order": []}, "plan.json")
    # ValueError: plan.json: `version` must be a whole number of at least 0, but is -1
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

Schema = Callable[[Any, str], None]

_LARGEST = 2**63 - 1
_SHOWN = 60  # characters of a wrong value that an error shows


def wrong(at: str, rule: str, value: Any) -> ValueError:
    """Makes the error of a value that breaks a rule.

    Args:
        at: the place of the value, such as "plan.json: `leaves/w`".
        rule: what it must be.
        value: the value.

    Returns:
        The error; it shows the first characters of the value.

    Example:
        >>> wrong("plan.json: `version`", "a text", 3)
        ValueError('plan.json: `version` must be a text, but is 3')
    """
    shown = ascii(value) if isinstance(value, str | int | float | None) else type(value).__name__
    shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
    return ValueError(f"{at} must be {rule}, but is {shown}")


def anything(value: Any, at: str) -> None:
    """Accepts every value.

    Example:
        >>> anything(None, "a.json")
    """


def text(value: Any, at: str) -> None:
    """Accepts a string.

    Example:
        >>> text("a", "a.json")
    """
    if not isinstance(value, str):
        raise wrong(at, "a text", value)


def flag(value: Any, at: str) -> None:
    """Accepts True and False.

    Example:
        >>> flag(True, "a.json")
    """
    if not isinstance(value, bool):
        raise wrong(at, "true or false", value)


def number(value: Any, at: str) -> None:
    """Accepts a whole or a floating-point number, NaN and infinity included, and no bool.

    Example:
        >>> number(0.5, "a.json")
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong(at, "a number", value)


def finite(value: Any, at: str) -> None:
    """Accepts a number that is neither NaN nor infinite.

    Example:
        >>> finite(0.5, "a.json")
    """
    number(value, at)
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong(at, "a finite number", value)


def whole(low: int = 0, high: int = _LARGEST) -> Schema:
    """Accepts whole numbers in a range; True is none of them.

    Args:
        low: the least of them.
        high: the largest of them.

    Returns:
        The schema.

    Example:
        >>> whole(high=3)(4, "a.json")
        Traceback (most recent call last):
        ValueError: a.json must be a whole number in 0 .. 3, but is 4
    """
    rule = f"in {low} .. {high}" if high < _LARGEST else f"of at least {low}"

    def check(value: Any, at: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise wrong(at, f"a whole number {rule}", value)

    return check


def one_of(*values: Hashable) -> Schema:
    """Accepts some values.

    Args:
        *values: strings or numbers.

    Returns:
        The schema.

    Example:
        >>> one_of("trained", "new")("new", "a.json")
    """

    def check(value: Any, at: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            raise wrong(at, f"one of {', '.join(map(repr, values))}", value)

    return check


def maybe(schema: Schema) -> Schema:
    """Accepts None and what a schema accepts.

    Args:
        schema: of any other value.

    Returns:
        The schema.

    Example:
        >>> maybe(text)(None, "a.json")
    """

    def check(value: Any, at: str) -> None:
        if value is not None:
            schema(value, at)

    return check


def each(schema: Schema, *, unique: bool = False, length: int | None = None) -> Schema:
    """Accepts lists, also tuples, of which each entry fits a schema.

    Args:
        schema: of the entries.
        unique: whether no entry may occur twice.
        length: the number of entries; None for any.

    Returns:
        The schema.

    Example:
        >>> each(text, unique=True)(["a", "a"], "a.json")
        Traceback (most recent call last):
        ValueError: a.json must hold each entry once, but has 'a' twice
    """

    def check(value: Any, at: str) -> None:
        if not isinstance(value, list | tuple):
            raise wrong(at, "a list", value)
        if length is not None and len(value) != length:
            raise ValueError(f"{at} must have {length} entries, but has {len(value)}")
        for index, entry in enumerate(value):
            schema(entry, below(at, index))
        if unique and len(set(value)) < len(value):
            twice = Counter(value).most_common(1)[0][0]
            raise ValueError(f"{at} must hold each entry once, but has {twice!r} twice")

    return check


def table(schema: Schema) -> Schema:
    """Accepts objects of any names, whose values fit a schema.

    Args:
        schema: of the values.

    Returns:
        The schema.

    Example:
        >>> table(whole())({"a": 1}, "a.json")
    """

    def check(value: Any, at: str) -> None:
        if not isinstance(value, Mapping):
            raise wrong(at, "an object", value)
        for name, own in value.items():
            text(name, f"{at}: the name {ascii(name)}")
            schema(own, below(at, name))

    return check


def record(
    fields: Mapping[str, Schema],
    *,
    optional: Mapping[str, Schema] | None = None,
    more: bool = False,
) -> Schema:
    """Accepts objects of given names.

    Args:
        fields: name -> schema of its value.
        optional: those that may be absent.
        more: whether other names may be there, too.

    Returns:
        The schema.

    Example:
        >>> record({"steps": whole()})({"step": 1}, "a.json")
        Traceback (most recent call last):
        ValueError: a.json must have `steps`, but has `step`
    """
    known = {**fields, **(optional or {})}

    def check(value: Any, at: str) -> None:
        if not isinstance(value, Mapping):
            raise wrong(at, "an object", value)
        if missing := [name for name in fields if name not in value]:
            present = ", ".join(f"`{ascii(name)[1:-1]}`" for name in list(value)[:9]) or "nothing"
            raise ValueError(f"{at} must have `{missing[0]}`, but has {present}")
        for name, own in value.items():
            if name in known:
                known[name](own, below(at, name))
            elif not more:
                raise ValueError(f"{at} must not have `{ascii(name)[1:-1]}`")

    return check


def below(at: str, name: Any) -> str:
    """Returns the place of an entry of a value.

    Args:
        at: the place of the value.
        name: the name or the index of the entry.

    Returns:
        Its place.

    Example:
        >>> below(below("plan.json", "leaves"), 0)
        'plan.json: `leaves/0`'
    """
    name = ascii(name)[1:-1] if isinstance(name, str) else str(name)
    name = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
    return f"{at[:-1]}/{name}`" if at.endswith("`") else f"{at}: `{name}`"
