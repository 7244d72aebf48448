"""scripts/train.py with channels that go while it trains: the same run, interrupted or not."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "train.py"
STEPS = 36
# Mask updates at 4, 12 and 20; switches are decided after them and happen 4 steps later.
OPTIONS = f"""digits_resnet8 --granularity channels --compact --sparsity 0.5 --steps {STEPS}
    --batch-size 16 --prune-start 0.11 --prune-stop 0.56 --prune-every 8 --switch-delay 4
    --switch-steps 0.1 --saving 0.05 --eval-every 18 --eval-batch-size 360 --save-every 6
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


def stopped_at(workdir, environment, step, number):
    """Sends a signal once a step is reported; returns what was printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(workdir), env=environment, **pipes)
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
    assert steps == [17, 25], "after the mask updates at 12 and 20"
    parameters = [entry["parameters"] for entry in summary["switches"]]
    assert parameters == sorted(parameters, reverse=True)
    assert summary["parameters"] == parameters[-1]
    assert summary["widths"] == {"stem": 4, "blocks": [[5, 4], [6, 7], [8, 9]]}
    assert "parameters" in output and summary["sparsity"] > 0.7
    assert all(entry["difference"] < 1e-4 for entry in summary["switches"])


def test_killed_before_and_after_a_switch(finished, environment, tmp_path):
    reference, _ = finished
    # A switch is decided on and not done yet; the network is small already; it is being told to go.
    stopped_at(tmp_path, environment, 16, signal.SIGKILL)
    assert record(tmp_path, 12)["record"]["network"]["switch_at"] is None
    stopped_at(tmp_path, environment, 22, signal.SIGKILL)
    saved = record(tmp_path, 17)["record"]["network"]
    assert [entry["step"] for entry in saved["history"]] == [17]
    stopped_at(tmp_path, environment, 24, signal.SIGTERM)
    run(tmp_path, environment)
    assert record(tmp_path)["leaves"] == record(reference)["leaves"], "bit for bit"
    found, expected = summary_of(tmp_path), summary_of(reference)
    assert found["test_accuracy"] == expected["test_accuracy"]
    assert [entry["widths"] for entry in found["switches"]] == [
        entry["widths"] for entry in expected["switches"]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "rigl"], "`method` must be one of none, agip, magnitude, random"),
        (["--granularity", "weights"], "`compact` needs a method that prunes"),
        (["--switch-delay", "8"], "`switch_delay` must be less than `prune_every` (8)"),
    ],
)
def test_bad_options(options, message, environment, tmp_path):
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command(tmp_path, *options), env=environment, **pipes)
    assert done.returncode and message in " ".join((done.stdout + done.stderr).split())
    assert "Traceback" not in done.stderr
