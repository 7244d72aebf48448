"""The journal of a search: a file of JSON lines, one for each evaluation, from which it resumes."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxprune import files
from jaxprune.files import schemas
from jaxprune.search._problems import Counts, Problem

_HEADER = schemas.record(
    {
        "search": schemas.text,
        "settings": schemas.table(schemas.anything),
        "decisions": schemas.table(schemas.whole()),
        "problem": schemas.whole(),
        "budget": schemas.finite,
    }
)
_LINE = schemas.record({"counts": schemas.each(schemas.whole()), "score": schemas.finite})


class Journal:
    """The evaluations that a file has, and the file to which more are appended.

    Example:
        >>> Journal([((2, 3), 0.5)]).replay(0, (2, 3))
        0.5
    """

    def __init__(
        self, records: Sequence[tuple[Counts, float]], file: IO[bytes] | None = None, path: Any = ""
    ) -> None:
        """Keeps what was read."""
        self._records, self._file, self._path = list(records), file, path

    @property
    def known(self) -> dict[Counts, float]:
        """Counts -> score, of all evaluations that the file had when it was opened."""
        return dict(self._records)

    def replay(self, index: int, counts: Counts) -> float | None:
        """Returns the score of an evaluation; None if it has not been made yet."""
        if index >= len(self._records):
            return None
        saved, score = self._records[index]
        if saved != counts:
            raise ValueError(
                f"`journal` {self._path} must be of this search, but evaluation {index} is of "
                f"{list(saved)}, where the search now proposes {list(counts)}: it was made with "
                "another version or on a device that rounds differently. Use a new file."
            )
        return score

    def append(self, index: int, counts: Counts, score: float) -> None:
        """Writes an evaluation to disk unless the file has it already."""
        if index < len(self._records) or self._file is None:
            return
        with files.naming(self._path):
            self._file.write(_encoded({"counts": list(counts), "score": score}))
            self._file.flush()
            os.fsync(self._file.fileno())


def read_journal(path: str | Path) -> tuple[dict[str, Any], list[tuple[Counts, float]]]:
    """Reads the journal of a search, also of one that was killed.

    Args:
        path: the file.

    Returns:
        What the search was: `search`, `settings`, `decisions` (name -> size), `budget`; and the
        counts and the score of each evaluation. A last line that was cut short is left out.

    Raises:
        ValueError: if the file is damaged.
        OSError: if it cannot be read.

    Example:
        >>> read_journal("/nowhere.jsonl")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    lines = Path(path).read_bytes().split(b"\n")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1]):  # the last one has no end, so it was cut short
        at = f"{path}: line {number + 1}"
        try:
            content = files.unseal(files.parse_json(line), at)
        except ValueError as error:
            raise ValueError(
                f"{at} is damaged ({error}); remove the file to start again"
            ) from error
        (_LINE if number else _HEADER)(content, at)
        found.append(content)
    if not found:
        return {}, []
    return found[0], [(tuple(own["counts"]), own["score"]) for own in found[1:]]


@contextlib.contextmanager
def open_journal(path: str | Path, header: Mapping[str, Any]) -> Iterator[Journal]:
    """Opens a journal, to resume the search that it is of, or begins one.

    Args:
        path: the file; its folder must exist.
        header: what the search is, from `header_of` or with the same keys: `search`, its name;
            `settings` that it depends on; `decisions`, name -> size; `problem`, a checksum of all
            else; `budget`.

    Yields:
        The `Journal`.

    Raises:
        ValueError: if the file is damaged, or belongs to a different search.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/journal.jsonl"
        >>> header = {"search": "s", "settings": {}, "decisions": {"a": 4}}
        >>> header |= {"problem": 0, "budget": 1}
        >>> with open_journal(path, header) as journal:
        ...     journal.append(0, (2,), 0.5)
        >>> with open_journal(path, header) as journal:
        ...     journal.known
        {(2,): 0.5}
    """
    header = json.loads(json.dumps(dict(header)))
    saved, records = read_journal(path) if Path(path).exists() else ({}, [])
    differing = [
        f"{key}: {saved[key]!r} there, {value!r} now"
        for key, value in header.items()
        if saved and saved[key] != value
    ]
    if differing:
        raise ValueError(
            "\n  ".join([f"`journal` {path} holds a different search; use a new file:", *differing])
        )
    lines = [_encoded({"counts": list(counts), "score": score}) for counts, score in records]
    with files.replacing(path, "wb") as file:  # without a line that was cut short
        file.write(b"".join([_encoded(header), *lines]))
    with files.appending(path) as file:
        yield Journal(records, file, path)


def _encoded(content: Mapping[str, Any]) -> bytes:
    return json.dumps(files.seal(content)).encode() + b"\n"


def header_of(problem: Problem, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describes a search of a problem, so that a journal of a different one is noticed."""
    checksum = 0
    for own in problem.decisions:
        for part in (own.widths.astype("int64"), own.order.astype("int64")):
            checksum = zlib.crc32(part.tobytes(), checksum)
    return {
        "search": name,
        "settings": dict(settings),
        "decisions": {own.name: own.size for own in problem.decisions},
        "problem": checksum,
        "budget": float(problem.budget),
    }
