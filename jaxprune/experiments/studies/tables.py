"""Results of a study: means and deviations over seeds, and the files results.jsonl and .md."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import checkpoints

Record = Mapping[str, Any]
Column = Callable[[Any], float | None]  # of a record; None: it has no such value


def aggregate(
    records: Iterable[Record], keys: Sequence[str], columns: Mapping[str, Column]
) -> list[dict[str, Any]]:
    """Makes one row of all records that agree in some fields, such as those of all seeds.

    Args:
        records: one for each run.
        keys: names of these fields.
        columns: name -> function from a record to a value.

    Returns:
        Rows in the order of their first records. Each has the fields, `runs`, and for each column
        the mean of its values and, under `NAME SD`, their sample standard deviation: None if there
        is no value, or only one.

    Example:
        >>> runs = [{"method": "a", "x": 1.0}, {"method": "b", "x": 5.0}, {"method": "a", "x": 3.0}]
        >>> for row in aggregate(runs, ["method"], {"x": lambda run: run["x"]}):
        ...     print(row)
        {'method': 'a', 'runs': 2, 'x': 2.0, 'x SD': 1.4142135623730951}
        {'method': 'b', 'runs': 1, 'x': 5.0, 'x SD': None}
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    rows = []
    for fields, runs in groups.items():
        row: dict[str, Any] = {**dict(zip(keys, fields, strict=True)), "runs": len(runs)}
        for name, column in columns.items():
            values = [value for value in map(column, runs) if value is not None]
            row[name] = statistics.mean(values) if values else None
            row[f"{name} SD"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def ratio(value: float, reference: float | None) -> float | None:
    """Returns a value relative to a reference, or None if there is none, or 0."""
    return value / reference if reference else None


def facts(commands: Iterable[str], records: Iterable[Record]) -> list[str]:
    """Lists the commands, devices and versions that results come from.

    Example:
        >>> run = {"device": "1 x cpu", "versions": {"jax": "0.10.2"}}
        >>> facts(["python scripts/study.py"], [run, run])
        ['command: `python scripts/study.py`', 'device: 1 x cpu', 'versions: jax 0.10.2']
    """
    found = [f"command: `{command}`" for command in commands]
    for record in records:
        found.append(f"device: {record['device']}")
        if "versions" in record:
            versions = record["versions"].items()
            found.append(f"versions: {', '.join(' '.join(version) for version in versions)}")
    return list(dict.fromkeys(found))


def write(
    workdir: Path, records: Iterable[Record], parts: Iterable[str], facts: Iterable[str]
) -> None:
    """Writes results.jsonl, a record a line, and results.md.

    Args:
        workdir: the folder of the study.
        records: JSON-ready.
        parts: tables and text of results.md, in order.
        facts: items of the list at its end.
    """
    lines = "".join(json.dumps(record) + "\n" for record in records)
    checkpoints.write_text(workdir / "results.jsonl", lines)
    items = "\n".join(f"- {fact}" for fact in facts)
    checkpoints.write_text(workdir / "results.md", "\n\n".join([*parts, items]) + "\n")
