"""scripts/rewind.py as a user runs it: killed, resumed, extended, refused; and its numbers."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxprune import storage
from jaxprune.experiments.studies import rewinding

SCRIPT = Path(__file__).parents[2] / "scripts" / "rewind.py"
STEPS = 12
COMMAND = shlex.split(
    "digits_resnet8 --methods rewind_learning_rate rewind_weights --rounds 2 --rewind-to .25 "
    "--save-every 5 --guard 1"
)
TRAINING = shlex.split(f"--steps {STEPS} --batch-size 16 --eval-batch-size 360 --log-every 6")


@pytest.fixture
def script(capsys):
    """The command in this process; `go(...)` returns its exit code and what it printed."""

    def go(*args):
        try:
            rewinding.main([str(arg) for arg in args])
            code = 0
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    return types.SimpleNamespace(go=go)


def start(workdir, environment, *more, seeds=("0",)):
    command = [sys.executable, str(SCRIPT), *COMMAND, "--workdir", str(workdir), *more]
    command += ["--seeds", *seeds, "--", *TRAINING]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def finish(*args, **options):
    process = start(*args, **options)
    text, _ = process.communicate(timeout=500)
    assert process.returncode == 0, text
    return text


def results(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def networks(workdir):
    """Name -> leaves of each sparse file."""
    return {
        path.name: storage.load(path)
        for path in sorted((workdir / "seed-0" / "networks").iterdir())
    }


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """The folder of a comparison that nothing interrupted, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, finish(workdir, environment)


def test_results_are_those_of_the_rounds(finished):
    workdir, text = finished
    runs = results(workdir)
    assert [(run["method"], run["number"]) for run in runs] == [
        ("dense", 0),
        ("rewind_weights", 1),
        ("rewind_weights", 2),
        ("rewind_learning_rate", 1),
        ("rewind_learning_rate", 2),
    ]
    epoch = 1437 // 16
    totals = [12, 21, 30, 24, 36]  # weight rewinding goes back to step 3
    assert [run["total_steps"] for run in runs] == totals
    assert [run["epochs"] for run in runs] == [total / epoch for total in totals]
    assert [run["density"] for run in runs] == pytest.approx([1, 0.8, 0.64, 0.8, 0.64], abs=1e-4)
    table = (workdir / "results.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| rewind")]
    assert [row[4] for row in rows[:4]] == [f"{run['score']:.2%}" for run in runs[1:]]
    change = runs[1]["score"] - runs[0]["score"]
    assert rows[0][6] == f"{change:+.2%}"
    assert f"python scripts/rewind.py {shlex.join(COMMAND)}" in table
    assert table in text
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")


def test_what_it_costs_is_said_first_and_is_so(finished):
    workdir, text = finished
    # 1 + 2 rounds * (.75 + 1)
    assert "4.5 trainings of 12 steps a seed, 54 steps for 1 seeds" in text
    steps = [run["steps"] for run in results(workdir)]
    assert sum(steps) == 54


def test_networks_are_written_as_sparse_files(finished):
    workdir, _ = finished
    found = networks(workdir)
    assert len(found) == 5
    tree, masks = found["rewind_weights-2.npz"]
    kernel, mask = tree["params"]["head"]["kernel"], masks["params"]["head"]["kernel"]
    assert not kernel[~mask].any() and 0 < mask.mean() < 1
    assert tree["model_state"]
    sizes = {n: (workdir / "seed-0/networks" / n).stat().st_size for n in found}
    assert sizes["rewind_weights-2.npz"] < 0.75 * sizes["dense-0.npz"]


def test_killed_inside_of_rounds_it_ends_with_the_same_bits(finished, environment, tmp_path):
    workdir = tmp_path / "killed"
    # The first checkpoint of the stage is there, its end is not.
    for stage in ("dense", "rewind_weights/round-2-density-0.64"):
        process = start(workdir, environment)
        folder = workdir / "seed-0" / stage / "checkpoints"
        limit = time.monotonic() + 400
        while not any(folder.glob("[0-9]*")) and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(workdir, environment)

    assert results(workdir) == results(finished[0])
    ours, theirs = networks(workdir), networks(finished[0])
    assert ours.keys() == theirs.keys()
    for name, (tree, _) in ours.items():
        jax.tree.map(np.testing.assert_array_equal, tree, theirs[name][0])


def test_more_rounds_methods_and_seeds_go_on(finished, environment, tmp_path):
    workdir = tmp_path / "more"
    shutil.copytree(finished[0], workdir)
    text = finish(workdir, environment, "--jobs", "2", "--rounds", "3", seeds=("0", "1"))
    assert "seed-0: done" in text and "seed-1: done" in text
    runs = results(workdir)
    assert len(runs) == 2 * 7
    before = {(run["method"], run["number"]): run for run in results(finished[0])}
    again = {(run["method"], run["number"]): run for run in runs if run["seed"] == 0}
    assert before.items() <= again.items()
    scores = {seed: [r["score"] for r in runs if r["seed"] == seed] for seed in (0, 1)}
    assert scores[0] != scores[1]
    row = next(
        line for line in (workdir / "results.md").read_text().splitlines() if "| none" in line
    )
    both = [run["score"] for run in runs if run["method"] == "dense"]
    assert f"| 2 | {np.mean(both):.2%} | {np.std(both, ddof=1):.2%} |" in row
    commands = json.loads((workdir / "config.json").read_text())["commands"]
    assert len(commands) == 2 and all("--child" not in command for command in commands)


def test_help_says_what_the_options_cost(script):
    code, text = script.go(
        "fashion_resnet20", "--rounds", "8", "--methods", "fine_tune", "--seeds", 0, 1, 2, "--help"
    )
    assert code is None
    # 1 + 8, of 30 epochs, for 3 seeds
    assert "9 trainings of 30 epochs a seed, 810 epochs for 3 seeds" in text
    assert "to density 0.168" in text
    for method, meaning in rewinding.METHODS.items():
        assert method in text and meaning in text.replace("\n", " ")
    code, text = script.go("--help")
    assert code is None and "Name a CONFIG before --help" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "CONFIG is missing"),
        (["digits_resnet8", "--rewind-to", "1.0"], "parts must lie in"),
        (["digits_resnet8", "--jobs", "0"], "--jobs and --save-every must be at least 1"),
        (["digits_resnet8", "--rounds", "0"], "`rounds` must be at least 1"),
        (["digits_resnet8", "--rate", "1"], "`rate` must lie in"),
        (["digits_resnet8", "--", "--sparsity", ".5"], "--sparsity may not be given"),
        (["digits_resnet8", "--", "--prune_every=5"], "--prune-every may not be given"),
        (["digits_resnet8", "--seeds", "-1"], "`seed` must be at least 0"),
        (["--report-only"], "holds no finished run to report"),
    ],
)
def test_refusals(args, message, script, tmp_path):
    end = args.index("--") if "--" in args else len(args)
    code, text = script.go(*args[:end], "--workdir", tmp_path / "a", *args[end:])
    assert code not in (0, None)
    assert message in text + str(code)


def test_a_workdir_of_another_comparison_is_refused(finished, script):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    for own, training in ((["--one-shot"], []), ([], ["--learning-rate", "9"])):
        args = [*COMMAND, *own, "--workdir", workdir, "--", *TRAINING, *training]
        code, text = script.go(*args)
        assert "holds a run with a different configuration" in str(code), text
    assert (workdir / "config.json").read_text() == before


def test_an_interrupt_says_how_to_go_on(script, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewinding, "run_seed", interrupted)
    code, text = script.go("digits_resnet8", "--workdir", tmp_path)
    assert code == 130 and "run the same command to resume" in text


def test_report_only_trains_nothing(finished, script):
    workdir, _ = finished
    before = (workdir / "results.jsonl").read_text()
    (workdir / "results.md").unlink()
    assert script.go("--report-only", "--workdir", workdir)[0] == 0
    assert (workdir / "results.jsonl").read_text() == before
    assert (workdir / "results.md").exists()
