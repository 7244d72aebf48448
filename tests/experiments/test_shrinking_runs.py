"""scripts/train.py with channels that go while it trains: the same run, interrupted or not."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprune.experiments import train

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS = 36
# Mask updates at 4, 12 and 20; switches are decided after them and happen 4 steps later. Images are
# to grow from step 15 on: after the switch that is pending then.
OPTIONS = f"""digits_resnet8 --granularity channels --compact --sparsity 0.5 --steps {STEPS}
    --batch-size 16 --prune-start 0.11 --prune-stop 0.56 --prune-every 8 --switch-delay 4
    --switch-steps 0.1 --saving 0.05 --small-images 0.5 --small-until 0.4 --parts 2
    --rewarm-steps 3 --multiple 1 --eval-every 18 --eval-batch-size 360 --save-every 6
    --log-every 2""".split()
WIDTHS = json.dumps({"stem": 8, "blocks": [[10, 8], [12, 14], [16, 18]]})


def command(workdir, *more):
    options = [*OPTIONS, "--widths", WIDTHS, "--workdir", str(workdir), *more]
    return [sys.executable, str(SCRIPT), *options]


def run(workdir, environment, *more):
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command(workdir, *more), env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stopped_at(workdir, environment, step, number, *more):
    """Sends a signal once a step is reported; returns what was printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(workdir, *more), env=environment, **pipes)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
    process.communicate(timeout=300)
    assert not (workdir / "summary.json").exists(), "the run ended before the signal"
    return "".join(lines)


def record(workdir, step=STEPS):
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run(workdir, environment)


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


def test_the_network_gets_smaller_in_steps(finished):
    workdir, output = finished
    summary = summary_of(workdir)
    steps = [entry["step"] for entry in summary["switches"]]
    assert steps == [17, 21, 25], (
        "masks that changed at 12, larger images, masks that changed at 20"
    )
    assert [entry["image_size"] for entry in summary["switches"]] == [[4, 4], [8, 8], [8, 8]]
    parameters = [entry["parameters"] for entry in summary["switches"]]
    assert parameters == sorted(parameters, reverse=True)
    assert summary["parameters"] == parameters[-1]
    assert summary["widths"] == {"stem": 4, "blocks": [[5, 4], [6, 7], [8, 9]], "head": None}
    assert "pixels 4" in output and "pixels 8" in output
    assert set(summary["file_bytes"]) == {"exact", "bfloat16", "int8"}
    assert summary["file_bytes"]["int8"] < summary["file_bytes"]["bfloat16"]
    assert "parameters" in output and summary["sparsity"] > 0.7
    assert all(entry.get("difference", 0.0) < 1e-4 for entry in summary["switches"])
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    at = {r["step"]: r for r in records if "train_loss" in r}
    assert [at[step]["parts"] for step in (2, 20, 24, 36)] == [1, 1, 2, 1]
    assert [at[step]["image_height"] for step in (2, 20, 24)] == [4, 4, 8]
    tests = {r["step"]: r["image_height"] for r in records if "test_accuracy" in r}
    assert tests == {18: 4, 36: 8}, "tests take images of the size of training"
    assert at[26]["macs"] < at[24]["macs"] == at[20]["macs"] < at[16]["macs"] == at[2]["macs"]
    assert at[24]["peak_bytes"] != at[20]["peak_bytes"]
    # The rate after the switches at 17 and 25 rises from a third to the whole of the cosine.
    rates = {step: 0.05 * (1 + math.cos(math.pi * (step - 1) / STEPS)) for step in at}
    for step, share in {16: 1, 18: 1 / 3, 20: 1, 26: 1 / 3, 28: 1}.items():
        assert at[step]["learning_rate"] == pytest.approx(share * rates[step], rel=1e-5)
    assert summary["step_peak_bytes"] == max(r["peak_bytes"] for r in at.values())
    assert 0 < at[2]["seconds"] < at[36]["seconds"] <= summary["seconds"]


# Ends without a word after the checkpoint of step 13.
DYING = """
import os, sys
from jaxprune import checkpoints
from jaxprune.experiments import train
save = checkpoints.save
def last(manager, step, *rest):
    save(manager, step, *rest)
    if step == 13:
        os._exit(9)
checkpoints.save = last
train.main(sys.argv[1:])
"""
FULL = """
import sys
from jaxprune import checkpoints
from jaxprune.experiments import train
save = checkpoints.save
def full(manager, step, *rest):
    if step >= 17:
        raise OSError(28, "No space left on device")
    save(manager, step, *rest)
checkpoints.save = full
train.main(sys.argv[1:])
"""


def test_interrupted_before_and_after_switches(finished, environment, tmp_path):
    """One run, interrupted four times: the same command goes on and ends with the same bits."""
    reference, _ = finished
    every = ["--save-every", "13"]
    pipes = {"capture_output": True, "text": True, "timeout": 300}

    # Masks have changed in step 12; after the checkpoint of step 13 a switch is decided on.
    words = [sys.executable, "-c", DYING, *command(tmp_path, *every)[2:]]
    assert subprocess.run(words, env=environment, **pipes).returncode == 9
    assert record(tmp_path, 13)["record"]["stage"]["coming"] is None

    # A disk that is full at the switch: the checkpoints before it are whole.
    words = [sys.executable, "-c", FULL, *command(tmp_path, *every)[2:]]
    done = subprocess.run(words, env=environment, **pipes)
    assert done.returncode == 1 and "error: [Errno 28] No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert kept[-1] == 13 and not (tmp_path / "summary.json").exists()

    # The network is small, images have grown, and the last switch is pending.
    stopped_at(tmp_path, environment, 22, signal.SIGKILL, *every)
    saved = record(tmp_path, 21)["record"]["stage"]
    assert [entry["step"] for entry in saved["history"]] == [17, 21]
    assert saved["coming"]["step"] == 25 and saved["coming"]["keep"]
    stopped_at(tmp_path, environment, 24, signal.SIGTERM, *every)

    run(tmp_path, environment, *every)
    assert record(tmp_path)["leaves"] == record(reference)["leaves"], "bit for bit"
    found, expected = summary_of(tmp_path), summary_of(reference)
    assert found["test_accuracy"] == expected["test_accuracy"]
    assert [entry.get("widths") for entry in found["switches"]] == [
        entry.get("widths") for entry in expected["switches"]
    ]


@pytest.mark.slow
def test_held_out_images_and_the_test_images(tmp_path):
    """Held-out images are evaluated on while it trains, the 360 test images at the end."""
    options = "digits_resnet8 --method none --steps 4 --batch-size 16 --eval-every 2".split()
    options += ["--validation", "100", "--train-images", "64", "--workdir", str(tmp_path)]
    train.main(options)
    found = summary_of(tmp_path)
    for name, count in (("test_accuracy", 100), ("unseen_accuracy", 360)):
        assert found[name] * count == pytest.approx(round(found[name] * count), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "rigl"], "`method` must be one of none, agip, magnitude, random"),
        (["--granularity", "weights"], "`compact` needs a method that prunes"),
        (["--switch-delay", "8"], "`switch_delay` must be less than `prune_every` (8)"),
        (["--parts", "3"], "`parts` must divide `batch_size` (16); got 3"),
        (["--small-images", "0.3"], "makes images of 2 x 2 pixels of 8 x 8; at least 4 x 4"),
        (["--validation", "9999"], "`validation` must be less than the 1437 training images"),
    ],
)
def test_bad_options(options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        train.main(command(tmp_path, *options)[2:])
    printed = capsys.readouterr()
    text = f"{printed.out}{printed.err}{stopped.value.code}"
    assert stopped.value.code and message in " ".join(text.replace("│", " ").split())


def test_a_network_with_thirty_six_groups(environment, tmp_path):
    """Of a ResNet-50 the names of groups sort differently from their order; with its own widths."""
    streams = [width for width, depth in zip((8, 12, 16, 20), (3, 4, 6, 3)) for _ in range(depth)]
    blocks = [[4 + 2 * (i % 2), 6, width] for i, width in enumerate(streams)]
    options = """synthetic_resnet50 --granularity channels --sparsity 0.5 --steps 2
        --dtype float32 --image-size 32 --batch-size 4 --prune-start 0.5 --prune-stop 0.5
        --eval-every 2 --eval-batch-size 4 --save-every 100 --log-every 1""".split()
    widths = json.dumps({"stem": 8, "blocks": blocks})
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--widths", widths, "--workdir", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 0.5 < summary_of(tmp_path)["sparsity"] < 0.75
    assert "had no statistic" not in done.stdout
