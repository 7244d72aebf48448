"""Where the numbers of a run go while it trains: metrics.jsonl, TensorBoard, a line or a bar."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxprune.checkpoints import write_text

__all__ = ["MetricsLog", "show_progress"]

# Label on screen -> (name of the metric, format).
_SHOWN = {
    "loss": ("train_loss", "{:.4f}"),
    "accuracy": ("train_accuracy", "{:.1%}"),
    "test": ("test_accuracy", "{:.2%}"),
    "sparsity": ("sparsity", "{:.1%}"),
    "images/s": ("images_per_second", "{:,.0f}"),
}


class MetricsLog:
    """metrics.jsonl and TensorBoard of one run.

    What was written after the step it starts from is forgotten, so that a run that was killed and
    goes on from its last checkpoint records nothing twice.

    Args:
        workdir: existing folder; gets `metrics.jsonl` and `tensorboard/`.
        step: the step that the run starts from.
        write: False keeps records in memory only, as all but one of several processes do.

    Example:
        >>> import tempfile
        >>> with MetricsLog(tempfile.mkdtemp(), step=0) as log:
        ...     log.write(5, {"train_loss": 0.25})
        >>> log.records
        [{'step': 5, 'train_loss': 0.25}]
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int, *, write: bool = True) -> None:
        """Opens the files."""
        from tensorboardX import SummaryWriter

        self._file = self._board = None
        path = Path(workdir) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [_parse(line) for line in lines]
        self.records = [record for record in records if record.get("step", math.inf) <= step]
        if not write:
            return
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = path.open("a")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one record, on disk at once."""
        self.records.append({"step": step, **values})
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(self.records[-1]) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        for opened in filter(None, (self._file, self._board)):
            opened.close()


@contextlib.contextmanager
def show_progress(
    label: str, steps: int, step: int = 0, *, write: bool = True
) -> Iterator[Callable[..., None]]:
    """Shows how a run is doing: a bar on a terminal, elsewhere a line per call.

    Args:
        label: name of the run.
        steps: how many steps the run has.
        step: the step that it starts from.
        write: False shows nothing.

    Yields:
        `show(step, values)`. Metrics that a call does not give keep their last value.

    Example:
        >>> with show_progress("demo", steps=100) as show:
        ...     show(50, {"train_loss": 0.5, "sparsity": 0.72, "seconds_per_step": 2.0})
        step 50/100  loss 0.5000  sparsity 72.0%  1:40 left
    """
    latest: dict[str, float] = {}
    if not write:
        yield lambda step, values: None
        return
    if not sys.stdout.isatty():

        def show(step: int, values: Mapping[str, float]) -> None:
            latest.update(values)
            parts = [f"step {step}/{steps}", *_parts(latest), *_time_left(steps - step, latest)]
            print("  ".join(parts), flush=True)

        yield show
        return
    from rich import console, live, progress

    columns = "{task.description}", progress.BarColumn(), progress.MofNCompleteColumn()
    bar = progress.Progress(*columns, "{task.fields[left]}")
    task = bar.add_task(label, total=steps, completed=step, left="compiling")
    with live.Live(bar) as screen:

        def show(step: int, values: Mapping[str, float]) -> None:
            latest.update(values)
            bar.update(task, completed=step, left="".join(_time_left(steps - step, latest)))
            # A line of its own: beside the bar it would not fit into 80 columns.
            screen.update(console.Group(bar, "  ".join(_parts(latest))))

        yield show


def _parts(latest: Mapping[str, float]) -> list[str]:
    """The metrics that are known, as text."""
    known = [(name, *shown) for name, shown in _SHOWN.items() if shown[0] in latest]
    return [f"{name} {form.format(latest[key])}" for name, key, form in known]


def _time_left(steps: int, latest: Mapping[str, float]) -> list[str]:
    """Minutes and seconds, once a step has been timed."""
    if "seconds_per_step" not in latest:
        return []
    seconds = round(steps * latest["seconds_per_step"])
    return [f"{seconds // 60}:{seconds % 60:02} left"]


def _parse(line: str) -> dict[str, Any]:
    """One line of metrics.jsonl; empty where a kill cut it short."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
