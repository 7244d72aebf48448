"""The metrics file loses and doubles nothing; the display says what is known."""

import json
import os
import re

import pytest

from jaxprune.experiments import results
from jaxprune.logs import MetricsLog, read_records, show_progress


def test_metrics_forget_what_came_after_the_checkpoint(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step in (2, 4, 6):
            log.write(step, {"train_loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')  # killed while it wrote
    with MetricsLog(tmp_path, 4) as log:
        assert [record["step"] for record in log.records] == [2, 4]
        log.write(6, {"train_loss": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[-1] == '{"step": 6, "train_loss": 0.5}'
    assert len(lines) == 3


# Step -> what a run has measured there. Its last evaluation is not the best one.
RUN = [
    (10, {"train_loss": 0.5, "seconds_per_step": 0.25}),
    (10, {"test_accuracy": 0.9639}),
    (20, {"train_loss": 0.25, "seconds_per_step": 0.5}),
    (20, {"test_accuracy": 0.9528}),
    (30, {"train_loss": 0.125, "seconds_per_step": 0.75}),
    (30, {"test_accuracy": 0.9583}),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """metrics.jsonl of that run, and how many records it has."""
    folder = tmp_path_factory.mktemp("whole")
    with MetricsLog(folder, 0) as log:
        for step, values in RUN:
            log.write(step, values)
    assert log.count == len(RUN) and not log.lost
    return (folder / "metrics.jsonl").read_bytes(), log.count


@pytest.mark.slow
def test_a_log_that_is_cut_at_any_byte_gives_the_last_figures_or_none(whole, tmp_path):
    """scripts/train.py at its last checkpoint: the state is there, any part of the log is not."""
    contents, count = whole
    path = tmp_path / "metrics.jsonl"
    seen = set()
    for size in range(len(contents) + 1):
        path.write_bytes(contents[:size])
        left = len(read_records(path))
        assert read_records(path) == [{"step": step} | values for step, values in RUN[:left]]
        with MetricsLog(tmp_path, 30, expected=count) as log:
            assert log.lost == count - left
            if results.is_untested(log, 30):
                log.write(30, {"test_accuracy": 0.9583})  # what the state gives again
        found = results.figures(log.records, 30, log.lost)
        assert found["test_accuracy"] == 0.9583
        assert (found["train_loss"], found["seconds_per_step"]) in [(0.125, 0.5), (None, None)]
        assert log.count == count
        assert (found["train_loss"] is None) == bool(log.lost)
        assert found["missing"].keys() == {n for n in found if found[n] is None}
        if log.lost:
            assert found["missing"]["train_loss"].endswith("has lost the record of step 30")
            assert f"has lost {log.lost} records" in found["missing"]["seconds_per_step"]
        seen.add(log.lost)
        # What is written again is whole, and the next process counts the same.
        with MetricsLog(tmp_path, 30, expected=log.count) as again:
            assert again.records == log.records and again.lost == log.lost
    assert seen == {0, 1, 2, 3, 4, 5}


def test_figures_of_an_earlier_step_are_not_those_of_the_end():
    records = [{"step": 10, "test_accuracy": 0.9, "train_loss": 1.0}]
    found = results.figures(records, 20, 0)
    assert found["test_accuracy"] is None and found["train_loss"] is None
    assert found["seconds_per_step"] is None
    assert found["missing"]["seconds_per_step"] == "no step was timed"


def test_lost_records_stay_lost_while_the_run_goes_on(tmp_path):
    with MetricsLog(tmp_path, 10, expected=3) as log:
        assert log.lost == 3
        log.write(12, {"train_loss": 1.0})
    assert (log.lost, log.count) == (3, 4)
    with MetricsLog(tmp_path, 12, expected=log.count) as log:
        assert (log.lost, log.count) == (3, 4)


NO_RECORDS = [
    b"[1]",
    b"null",
    b'{"step": 3, "note": "\xc3',
    b"\xff",
    b"3",
    b"",
    b"{}",
    b'{"train_loss": 1.0}',
    b'{"step": null}',
    b'{"step": "2"}',
    b'{"step": 2.0}',
    b'{"step": -1}',
    b'{"step": true}',
    b'{"step": 2, "step": 3}',
    b'{"step": 2, "train_loss": "low"}',
    b'{"step": 2, "train_loss": null}',
    b'{"step": 2, "train_loss": [1]}',
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", NO_RECORDS)
def test_lines_that_are_no_records_are_left_out(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    assert read_records(path) == [{"step": 1}, {"step": 2}]
    with MetricsLog(tmp_path, 1, expected=2) as log:  # a run goes on, and knows that one is lost
        assert (log.records, log.lost) == ([{"step": 1}], 1)
        assert not log.has(1, "train_loss")


def test_records_are_on_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
    """`sync` writes through to the disk; a record is with the system before that."""
    synced = []
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, {"train_loss": 1.0})
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
        monkeypatch.setattr(os, "fsync", synced.append)
        log.sync()
        assert synced == [log._file.fileno()]
    with MetricsLog(tmp_path, 0, write=False) as log:
        log.sync()


def scalars(folder):
    """What TensorBoard finds in all files of a run, without its package: (step, name, value)."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.glob("tensorboard/events*")):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")  # then a checksum, the event, another one
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.HasField("session_log"):
                found = [one for one in found if one[0] < event.step]
            found += [(event.step, one.tag, one.simple_value) for one in event.summary.value]
    return found


def test_tensorboard_has_every_value_at_once(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(2, {"train_loss": 0.5, "sparsity": 0})
        assert scalars(tmp_path) == [(2, "train_loss", 0.5), (2, "sparsity", 0.0)]
        log.write(4, {"train_loss": 0.25})
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.0"))  # names have the second in which they began
    with MetricsLog(tmp_path, 2) as log:
        log.write(4, {"train_loss": 0.125})
    seen = [(2, "train_loss", 0.5), (2, "sparsity", 0.0), (4, "train_loss", 0.125)]
    assert scalars(tmp_path) == seen


@pytest.mark.parametrize("part", ["_file", "_board"])
def test_a_full_disk_is_an_error_that_names_the_file(part, tmp_path):
    """It must neither hang nor be hidden by what closing the files says."""
    full = open("/dev/full", "wb") if os.path.exists("/dev/full") else pytest.skip("no /dev/full")
    name = {"_file": "/dev/full", "_board": str(tmp_path / "tensorboard")}[part]
    with pytest.raises(OSError, match=f"No space left on device: '{name}'"):
        with MetricsLog(tmp_path, 0) as log:
            if part == "_file":
                log._file.close()
                log._file = full
            else:
                log._board._records._writer.close()
                log._board._records._writer = full
            for step in range(1, 1000):
                log.write(step, {"train_loss": 1.0})


def test_records_are_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text('{"step": 1}\n')
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "mine")
    with MetricsLog(tmp_path / "run", 1) as log:
        log.write(2, {"train_loss": 1.0})
    assert (tmp_path / "mine").read_text() == '{"step": 1}\n'
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 2


def test_lines_elsewhere_keep_the_last_values(capsys):
    with show_progress("resnet8", steps=100) as show:
        show(50, {"train_loss": 0.5, "seconds_per_step": 0.5})
        show(60, {"test_accuracy": 0.875})
    assert capsys.readouterr().out.splitlines() == [
        "step 50/100  loss 0.5000  0:25 left",
        "step 60/100  loss 0.5000  test 87.50%  0:20 left",
    ]


def test_bar_on_a_terminal_shows_the_same_numbers(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with show_progress("resnet8", steps=100) as show:
        show(50, {"train_loss": 0.5, "sparsity": 0.72, "seconds_per_step": 2.0})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    for part in ("resnet8", "50/100", "1:40 left", "loss 0.5000", "sparsity 72.0%"):
        assert part in text
