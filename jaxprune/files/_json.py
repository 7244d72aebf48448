"""JSON that is read strictly, and JSON with a checksum."""

import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHECKSUM = "crc32"


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.

    Returns:
        Its content, or None if there is no such file.

    Raises:
        ValueError: if the file is not JSON in UTF-8, or an object in it has a name twice.
        OSError: if it cannot be read.

    Example:
        >>> read_json("/nowhere.json") is None
        True
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it from a copy or remove it."
        ) from error


def parse_json(content: bytes) -> Any:
    """Parses JSON.

    Args:
        content: the text in UTF-8.

    Returns:
        Its value.

    Raises:
        ValueError: if the text is not JSON in UTF-8, is nested too deeply, or has an object with a
            name that occurs twice.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: the name 'a' occurs twice
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum, so that a change by accident is noticed; it is no defence against an attack.

    Args:
        content: JSON-ready values.

    Returns:
        The content, as it is after a trip through JSON, with its CRC-32 as `crc32`.

    Raises:
        ValueError: if `content` has that name already.

    Example:
        >>> seal({"cut": 30})
        {'cut': 30, 'crc32': 3270225701}
    """
    if _CHECKSUM in content:
        raise ValueError(f"`content` must not have the name {_CHECKSUM!r}; use a different one")
    content = json.loads(json.dumps(dict(content)))
    return {**content, _CHECKSUM: _checksum(content)}


def unseal(content: Any, at: str) -> dict[str, Any]:
    """Checks and removes the checksum of `seal`.

    Args:
        content: what was read.
        at: the place of it, for errors.

    Returns:
        The content without its checksum.

    Raises:
        ValueError: if it is no object, has no checksum, or was changed.

    Example:
        >>> unseal(seal({"cut": 30}), "a.json")
        {'cut': 30}
        >>> unseal(seal({"cut": 30}) | {"cut": 70}, "a.json")
        Traceback (most recent call last):
        ValueError: a.json is damaged: its content does not have its checksum. ...
    """
    if not isinstance(content, Mapping) or _CHECKSUM not in content:
        raise ValueError(f"{at} is damaged: it must be an object with a checksum, `{_CHECKSUM}`")
    rest = {name: value for name, value in content.items() if name != _CHECKSUM}
    try:
        found = _checksum(rest)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{at} is damaged: it is not ready for JSON ({error})") from error
    if type(content[_CHECKSUM]) is not int or content[_CHECKSUM] != found:
        raise ValueError(
            f"{at} is damaged: its content does not have its checksum. Restore it from a copy; "
            "to change it on purpose, make it again with jaxprune."
        )
    return rest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object; a name that occurs twice would hide one of its values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {ascii(twice)[:60]} occurs twice")
    return found


def _checksum(content: Mapping[str, Any]) -> int:
    """Returns a CRC-32 that does not depend on the order of names."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())
