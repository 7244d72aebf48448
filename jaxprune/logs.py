"""Logs the numbers of a run while it trains: metrics.jsonl, TensorBoard, a line or a bar."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxprune.checkpoints import write_text
from jaxprune.files import appending, naming, parse_json, schemas

__all__ = ["MetricsLog", "read_records", "show_progress"]

# Label on screen -> (name of the metric, format).
_SHOWN = {
    "loss": ("train_loss", "{:.4f}"),
    "accuracy": ("train_accuracy", "{:.1%}"),
    "test": ("test_accuracy", "{:.2%}"),
    "pixels": ("image_height", "{:.0f}"),  # of an image's side, where it grows during the run
    "sparsity": ("sparsity", "{:.1%}"),
    "images/s": ("images_per_second", "{:,.0f}"),
}


_RECORD = schemas.record({"step": schemas.whole()}, more=True)


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the complete lines of metrics.jsonl; a line that is no record is skipped.

    A record is an object with a whole number as `step` and numbers. A kill may cut a line short.

    A log may have lost lines. Before a decision or a result rests on it, compare the number of
    records with an independent count, such as `records` of summary.json.

    Args:
        path: the file.

    Returns:
        The records in order; empty if there is no such file.

    Example:
        >>> read_records("/nowhere/metrics.jsonl")
        []
    """
    path = Path(path)
    # Read bytes: a line cut inside a character must not make the lines before it unreadable.
    lines = path.read_bytes().splitlines() if path.exists() else []
    parsed = [_parse(line) for line in lines]
    return [record for record in parsed if record is not None]


class MetricsLog:
    """The metrics of one run, written to metrics.jsonl and TensorBoard.

    Records after the step it starts from are dropped, so a run that was killed and continues from
    its last checkpoint records nothing twice.

    Args:
        workdir: an existing folder, for `metrics.jsonl` and `tensorboard/`.
        step: the step that the run starts from.
        expected: number of records up to that step, which is `count` when its checkpoint was saved.
            `lost` says how many of them the file lacks.
        write: False keeps records in memory only, for all but one of several processes.

    Example:
        >>> import tempfile
        >>> with MetricsLog(tempfile.mkdtemp(), step=0) as log:
        ...     log.write(5, {"train_loss": 0.25})
        >>> log.records
        [{'step': 5, 'train_loss': 0.25}]
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        step: int,
        *,
        expected: int = 0,
        write: bool = True,
    ) -> None:
        """Opens the files."""
        self._file = self._board = None
        path = Path(workdir) / "metrics.jsonl"
        records = read_records(path)
        self.records = [record for record in records if record["step"] <= step]
        self.lost, self._start = max(0, expected - len(self.records)), step
        if not write:
            return
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = appending(path)
        self._board = _Board(Path(workdir) / "tensorboard", step + 1)

    @property
    def count(self) -> int:
        """The number of records that the run has made, including lost ones."""
        return len(self.records) + self.lost

    def has(self, step: int, name: str) -> bool:
        """Tells whether a record of a step has a metric."""
        return any(record["step"] == step and name in record for record in self.records)

    def sync(self) -> None:
        """Forces all records to disk, where they outlive the machine. Call it before a save.

        `write` alone passes a record to the operating system, where it outlives the process.
        """
        if self._file is not None:
            os.fsync(self._file.fileno())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one record; it survives if the process is killed afterwards."""
        if step <= self._start:  # a lost record, measured again
            self.lost = max(0, self.lost - 1)
        self.records.append({"step": step, **values})
        if self._file is None or self._board is None:
            return
        with naming(self._file.name):
            self._file.write(json.dumps(self.records[-1]).encode() + b"\n")
            self._file.flush()
        self._board.write(step, values)

    def __enter__(self) -> "MetricsLog":
        """Returns itself."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes the files."""
        # After an error, such as that of a full disk, this one would only hide the first one.
        with contextlib.ExitStack() as stack:
            for close in (board.close for board in (self._file, self._board) if board is not None):
                stack.callback(_closed, close, quiet=kind is not None)
            if kind is None:
                self.sync()


class _Board:
    """Scalars for TensorBoard, written at once.

    `SummaryWriter` writes in a thread. If that meets a full disk it ends, and once its queue is
    full the run waits for it for ever.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Begins a file; records from a step on in earlier files no longer count."""
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2 as generated

        event_pb2: Any = generated
        self._event, self._scalar, self._folder = event_pb2.Event, summary.scalar, folder
        folder.mkdir(exist_ok=True)
        now = int(time.time())
        name = f"events.out.tfevents.{now}.{socket.gethostname()}.{os.getpid()}"
        self._records = record_writer.RecordWriter(str(folder / name))
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(file_version="brain.Event:2")
        self._add(step=purge_step, session_log=session)
        self._records.flush()

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        with naming(self._folder):
            for name, value in values.items():
                self._add(step=step, summary=self._scalar(name, value))
            self._records.flush()

    def close(self) -> None:
        """Closes the file."""
        self._records.close()


def _closed(close: Callable[[], Any], quiet: bool) -> None:
    """Closes a file; `quiet` ignores that the system refuses its last bytes."""
    try:
        close()
    except OSError:
        if not quiet:
            raise


@contextlib.contextmanager
def show_progress(
    label: str, steps: int, step: int = 0, *, write: bool = True
) -> Iterator[Callable[..., None]]:
    """Shows the progress of a run: a bar on a terminal, elsewhere a line per call.

    Args:
        label: name of the run.
        steps: number of steps of the run.
        step: the step that it starts from.
        write: False shows nothing.

    Yields:
        `show(step, values)`. A metric not given in a call keeps its last value.

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
            # Metrics have a separate line: beside the bar they would exceed 80 columns.
            screen.update(console.Group(bar, "  ".join(_parts(latest))))

        yield show


def _parts(latest: Mapping[str, float]) -> list[str]:
    """Formats the known metrics."""
    known = [(name, *shown) for name, shown in _SHOWN.items() if shown[0] in latest]
    return [f"{name} {form.format(latest[key])}" for name, key, form in known]


def _time_left(steps: int, latest: Mapping[str, float]) -> list[str]:
    """Formats the remaining minutes and seconds, once a step has been timed."""
    if "seconds_per_step" not in latest:
        return []
    seconds = round(steps * latest["seconds_per_step"])
    return [f"{seconds // 60}:{seconds % 60:02} left"]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Parses one line of metrics.jsonl; None if it is no record."""
    try:
        record = parse_json(line)
        _RECORD(record, "")
        for name, value in record.items():
            schemas.number(value, name)
    except ValueError:
        return None
    return record
