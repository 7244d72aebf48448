"""scripts/train.py as a user runs it: killed, stopped, resumed, refused."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprune import files
from jaxprune.experiments import train

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
STEPS = 80
# No option may differ between runs that are compared; one log a step shows the order of the data.
OPTIONS = (
    f"digits_resnet8 --steps {STEPS} --batch-size 16 --log-every 1 --eval-every 20 "
    "--eval-batch-size 360 --save-every 10 --prune-every 3 --flip --warmup-steps 2"
).split()
TIMINGS = {"seconds", "cpu_seconds", "seconds_per_step", "images_per_second"}


FIELDS = dataclasses.fields(train.Config)


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """The folder of a run that nothing interrupted, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, _run(workdir, environment)


def _command(workdir, *more):
    return [sys.executable, str(SCRIPT), *OPTIONS, "--workdir", str(workdir), *more]


def _run(workdir, environment, *more):
    done = subprocess.run(
        _command(workdir, *more), env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _interrupt(workdir, environment, step, number, *more):
    """Starts the run and sends it a signal once it has reported a step; its exit status."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(_command(workdir, *more), env=environment, **pipes)
    output = ""
    try:
        for line in process.stdout:
            output += line
            if line.startswith(f"step {step}/"):
                process.send_signal(number)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert f"step {step}/" in output, errors
    assert not (workdir / "summary.json").exists(), "the run ended before the signal"
    return process.returncode, output


def _checkpoint(workdir, step=STEPS):
    """What the checkpoint says about itself: checksums of all leaves and the data position."""
    record = json.loads((workdir / "checkpoints" / str(step) / "record" / "metadata").read_text())
    return record["leaves"], record["record"]["data"]


def _metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def _modified(workdir):
    files = (path for path in workdir.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files}


def _error(capsys, *args):
    """What a refused run prints; it must end with an error status and without a traceback."""
    with pytest.raises(SystemExit) as stopped:
        train.main([*args])
    code = stopped.value.code
    assert code not in (0, None)
    printed = capsys.readouterr()
    text = printed.out + printed.err + (code if isinstance(code, str) else "")
    assert "Traceback" not in text
    return " ".join(text.replace("│", " ").split())


def test_killed_and_stopped_run_equals_an_uninterrupted_one(finished, environment, tmp_path):
    """It begins in the folder of another run, which `--overwrite` deletes."""
    reference, tmp_path = finished[0], tmp_path / "run"
    shutil.copytree(reference, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"seed": 1}))
    code, output = _interrupt(tmp_path, environment, 12, signal.SIGKILL, "--overwrite")
    assert code == -signal.SIGKILL and "resumes at" not in output
    steps = {int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")}
    assert 10 in steps and STEPS not in steps
    assert (tmp_path / "notes.txt").read_text() == "mine"

    left = tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp"
    left.mkdir()
    code, output = _interrupt(tmp_path, environment, 33, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM  # `train.py && next` ends here
    assert not left.exists() and not (tmp_path / ".lock").exists()
    assert re.search("resumes at step [123]0\n", output)
    assert "stopped and saved at step" in output

    assert "resumes at step" in _run(tmp_path, environment)
    leaves, position = _checkpoint(tmp_path)
    assert (leaves, position) == _checkpoint(reference)
    assert any("masks" in path for path in leaves)
    assert position == {"next_index": STEPS}
    assert _metrics(tmp_path) == _metrics(reference)


def test_finished_run_has_everything(finished):
    workdir, output = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["parameters"] == 77_754
    assert 0 < summary["sparse_bytes"] < summary["dense_bytes"]
    assert 0 < summary["pruning_state_bytes"] < summary["state_bytes"]
    assert summary["sparsity"] == pytest.approx(0.72, abs=1e-4)
    assert summary["seconds"] > summary["seconds_per_step"] > 0
    assert summary["test_accuracy"] == _metrics(workdir)[-1]["test_accuracy"]
    assert set(summary["versions"]) == {"jax", "flax", "optax", "jaxprune"}
    config = json.loads((workdir / "config.json").read_text())
    assert set(config) == {field.name for field in FIELDS} | {"resolved_steps", "format"}
    for name in ("training.png", "densities.png"):
        assert (workdir / name).read_bytes()[1:4] == b"PNG"
    assert list((workdir / "tensorboard").iterdir())
    assert "blocks/2/conv2/kernel" in output
    steps = [record["step"] for record in _metrics(workdir) if "train_loss" in record]
    assert steps == list(range(1, STEPS + 1))
    sparsity = [record["sparsity"] for record in _metrics(workdir) if "sparsity" in record]
    assert sparsity == sorted(sparsity)
    assert sparsity[0] == 0


def test_finished_run_is_left_alone(finished, capsys):
    workdir, _ = finished
    before = _modified(workdir)
    train.main([*OPTIONS, "--workdir", str(workdir)])
    assert "is finished; --overwrite trains it again" in capsys.readouterr().out
    assert _modified(workdir) == before


def test_other_options_are_refused_and_nothing_is_lost(finished, capsys):
    workdir, _ = finished
    before = _modified(workdir)
    other = ["--sparsity", "0.9", "--seed", "1"]
    message = _error(capsys, *OPTIONS, "--workdir", str(workdir), *other)
    for part in (
        "sparsity: 0.72 there, 0.9 now",
        "seed: 0 there, 1 now",
        "--overwrite",
        "a different folder",
    ):
        assert part in message
    assert _modified(workdir) == before


def test_a_run_of_an_earlier_format_is_refused_by_name(finished, tmp_path, capsys):
    """Before 0.1.0 leaves of the optimizer state had other names."""
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("format") == train.FORMAT
    path.write_text(json.dumps(saved))
    before = _modified(tmp_path / "run")
    message = _error(capsys, *OPTIONS, "--workdir", str(tmp_path / "run"))
    assert (
        "holds a run of format 1" in message and "--overwrite" in message and "CHANGELOG" in message
    )
    assert _modified(tmp_path / "run") == before


def test_a_run_does_not_go_on_with_other_images(finished, tmp_path, monkeypatch, capsys):
    _cut(finished, tmp_path / "run", lambda text: text)

    class Other(train.Experiment):
        def __init__(self, *args):
            super().__init__(*args)
            self.source = self.source._replace(fingerprint=lambda: 7)

    monkeypatch.setattr(train, "Experiment", Other)
    message = _error(capsys, *OPTIONS, "--workdir", str(tmp_path / "run"))
    assert "a run with a different configuration: the images: " in message and "7 now" in message


def test_overwrite_deletes_nothing_where_no_run_was(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    train.delete_run(tmp_path)
    assert (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 1}'])
def test_overwrite_deletes_a_run_whose_configuration_is_lost(content, finished, tmp_path):
    workdir, path = tmp_path / "run", tmp_path / "run" / "config.json"
    shutil.copytree(finished[0], workdir)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("")
    shutil.rmtree(workdir / "tensorboard")
    (workdir / "tensorboard").symlink_to(tmp_path / "elsewhere")
    path.unlink()
    if content is not None:
        path.write_text(content)
    train.delete_run(workdir)
    assert list(workdir.iterdir()) == []
    assert (tmp_path / "elsewhere" / "mine").exists()


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", ["[1]", '{"a": 1, "a": 2}', "\udcff", "[" * 10_000])
def test_damaged_records_of_a_run_are_named(name, content, finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    message = _error(capsys, *OPTIONS, "--workdir", str(workdir))
    assert f"error: {workdir / name}" in message


def test_one_run_at_a_time_uses_a_folder(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = _modified(workdir)
    with files.locked(workdir):
        message = _error(capsys, *OPTIONS, "--workdir", str(workdir), "--overwrite")
    assert f"error: `workdir` {workdir} is in use by process {os.getpid()} on " in message
    assert "wait until it ends, end it, or use a different folder" in message
    assert _modified(workdir) == before
    (workdir / ".lock").write_text("of a run that was killed")
    train.main([*OPTIONS, "--workdir", str(workdir)])
    assert "is finished" in capsys.readouterr().out
    assert _modified(workdir) == before


@pytest.mark.parametrize("part", ["state", "record"])
def test_a_half_deleted_checkpoint_is_left_for_the_one_before(
    part, finished, environment, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / str(STEPS) / part)
    output = _run(workdir, environment)
    assert f"checkpoint {workdir}/checkpoints/{STEPS} is corrupt (" in output
    assert f"it was renamed to {STEPS}.damaged, and the one before it is used.\n" in output
    assert f"resumes at step {STEPS - 10}\n" in output
    assert _checkpoint(workdir) == _checkpoint(finished[0])
    assert _metrics(workdir) == _metrics(finished[0])


def test_corrupt_checkpoints_are_reported(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    for step in (STEPS - 10, STEPS):
        path = workdir / "checkpoints" / str(step) / "record" / "metadata"
        content = path.read_text()
        assert '"next_index": ' in content
        path.write_text(content.replace('"next_index": ', '"next_index": 1', 1))
    before = _modified(workdir)
    message = _error(capsys, *OPTIONS, "--workdir", str(workdir))
    assert f"error: checkpoint {workdir}/checkpoints/{STEPS} is corrupt (" in message
    assert "its record is damaged: its content does not have its checksum" in message
    assert _modified(workdir) == before


@pytest.mark.parametrize("gone", ["", "metrics.jsonl", "checkpoints"])
def test_a_folder_that_is_deleted_in_mid_run_is_an_error(gone, finished, tmp_path, capsys):
    """After the last checkpoint or before it; the run must not end as if all were well."""
    workdir = tmp_path / "run"
    _cut(finished, workdir, lambda text: text)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    command = [*OPTIONS, "--workdir", str(workdir)]
    loop = train.Run.loop

    def deletes(self, state):
        if gone != "checkpoints":
            path = workdir / gone
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        state = loop(self, state)
        if gone == "checkpoints":
            shutil.rmtree(workdir / gone)
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "loop", deletes)
        message = _error(capsys, *command)
    expected = "was deleted, moved or replaced while it was in use"
    if gone:
        name = f"checkpoints/{STEPS}" if gone == "checkpoints" else gone
        expected = f"has lost {name} while the run was going on"
    assert f"error: `workdir` {workdir} {expected}" in message
    assert not (workdir / "summary.json").exists()


def _cut(finished, workdir, keep):
    """A copy of the finished run before its summary, with `keep(contents)` of metrics.jsonl."""
    shutil.copytree(finished[0], workdir)
    for name in ("summary.json", "summary.txt", "report.html"):
        (workdir / name).unlink()
    path = workdir / "metrics.jsonl"
    path.write_bytes(keep(path.read_bytes()))


@pytest.mark.parametrize(
    ("keep", "lost"),
    [
        (lambda text: text[:-9], []),  # in the last line, which is the last evaluation
        (lambda text: b"".join(text.splitlines(True)[:-1]), []),
        (lambda text: text[: len(text) // 2], ["train_loss", "seconds_per_step"]),
        (lambda text: b"", ["train_loss", "seconds_per_step"]),
    ],
    ids=["a part of the last line", "the last line", "a half", "all"],
)
def test_a_log_that_lost_lines_gives_no_figure_of_an_earlier_step(
    keep, lost, finished, tmp_path, capsys
):
    workdir, before = tmp_path / "run", json.loads((finished[0] / "summary.json").read_text())
    _cut(finished, workdir, keep)
    train.main([*OPTIONS, "--workdir", str(workdir)])
    capsys.readouterr()
    after = json.loads((workdir / "summary.json").read_text())
    assert after["test_accuracy"] == before["test_accuracy"]
    assert after["sparsity"] == before["sparsity"] and after["records"] == before["records"]
    assert after["step_peak_bytes"] == before["step_peak_bytes"] > 0
    assert after["process_peak_bytes"] >= before["process_peak_bytes"]
    assert list(after["missing"]) == lost and before["missing"] == {}
    for name in ("train_loss", "seconds_per_step"):
        assert after[name] == (None if name in lost else before[name])
    assert _metrics(workdir)[-1]["test_accuracy"] == before["test_accuracy"]
    assert (workdir / "report.html").exists() and (workdir / "training.png").exists()


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = _error(capsys, *OPTIONS, "--workdir", str(tmp_path / "file"))
    assert "error: `folder`" in message
    assert "cannot be written" in message


@pytest.mark.parametrize(
    ("kilobytes", "message"),
    [
        (1, "File too large: "),
        (60, "/checkpoints/10 cannot be written ("),  # then one or more errors of its writers
    ],
)
def test_a_full_disk_is_one_line(kilobytes, message, finished, environment, tmp_path):
    """No file may be longer; Orbax and its threads would print hundreds of lines."""
    del finished  # it has compiled the programs, which would be too large as well
    command = ["bash", "-c", f'ulimit -f {kilobytes} && exec "$@"', "-", *_command(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    line = done.stderr
    assert line.startswith("error: ") and message in line and str(tmp_path) in line
    assert len(line) < 1000 and not (tmp_path / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["digits_resnet8", "--sparsty", "0.5"], ["Unrecognized options", "--sparsity"]),
        (["digits_resnet9"], ["digits_resnet9", "digits_resnet8", "fashion_resnet20"]),
        (["digits_resnet8", "--model", "resnet9"], ["resnet9", "resnet8", "resnet110"]),
        (["digits_resnet8", "--dataset", "mnist"], ["mnist", "fashion_mnist"]),
        (["digits_resnet8", "--method", "agp"], ["agp", "agip", "magnitude"]),
        (["digits_resnet8", "--steps", "many"], ["many", "INT"]),
        (["digits_resnet8", "--sparsity", "1.0"], ["`sparsity` must be in [0, 1); got 1.0"]),
        (["digits_resnet8", "--sparsity", "nan"], ["`sparsity` must be in [0, 1); got nan"]),
        (
            ["digits_resnet8", "--sparsity", "-1", "--learning-rate", "0", "--seed", "-3"],
            ["`sparsity` must", "`learning_rate` must be above 0; got 0.0", "`seed` must"],
        ),
        (["digits_resnet8", "--prune-start", "0.7"], ["`prune_stop` must not", "0.7", "0.6"]),
        (["digits_resnet8", "--regrow", "1.5"], ["`regrow` must be in [0, 1); got 1.5"]),
    ],
)
def test_bad_options_are_named(args, parts, capsys):
    message = _error(capsys, *args)
    for part in parts:
        assert part in message


def test_bad_configuration_in_python_is_named():
    with pytest.raises(ValueError, match="`model` must be one of resnet8, .*; got 'resnet9'"):
        train.Config(model="resnet9")
    with pytest.raises(ValueError, match=r"`prune_every` must be at least 1; got 0"):
        dataclasses.replace(train.CONFIGS["digits_resnet8"][1], prune_every=0)


@pytest.mark.parametrize("name", train.CONFIGS)
def test_help_explains_every_field(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in FIELDS:
        option = text.partition(f"--{field.name.replace('_', '-')}")[2]
        # The comment comes between the option and its default.
        assert len(option.partition("(default:")[0].split()) > 3, field.name


def test_help_lists_configurations(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in train.CONFIGS)
