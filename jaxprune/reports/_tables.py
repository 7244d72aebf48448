"""Writes rows of values as aligned text or Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]) -> str:
    """Writes an aligned plain-text table: first column to the left, all others to the right.

    Args:
        rows: one mapping per line. Integers get thousands separators, floats four digits; a missing
            value or None is a dash.
        columns: keys in order, or a mapping from key to heading.

    Returns:
        Heading, rule and rows, joined by newlines.

    Example:
        >>> print(table([{"run": "dense", "steps": 1200}], {"run": "", "steps": "Steps"}))
               Steps
        -----  -----
        dense  1,200
    """
    cells = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]
) -> str:
    """Writes a Markdown table with the same cells as `table`.

    Args:
        rows: one mapping per line, as in `table`.
        columns: keys in order, or a mapping from key to heading.

    Returns:
        Heading, rule and rows, joined by newlines.

    Example:
        >>> print(markdown_table([{"run": "dense", "steps": 1200}], ["run", "steps"]))
        | run | steps |
        | --- | ---: |
        | dense | 1,200 |
    """
    cells = _cells(rows, columns)
    cells.insert(1, ["---", *["---:"] * (len(cells[0]) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cells(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str]
) -> list[list[str]]:
    """Formats heading and rows as text."""
    keys = list(columns)
    headings = list(columns.values()) if isinstance(columns, Mapping) else keys
    return [headings, *([_text(row.get(key)) for key in keys] for row in rows)]


def _text(value: Any) -> str:
    """Formats one value for a table."""
    if value is None:
        return "-"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
