"""scripts/study.py with a stand-in for train.py: order, restarts, failures, stops and numbers."""

import dataclasses
import json
import os
import shutil
import statistics
import sys
import types
from typing import get_args

import pytest

from jaxprune import reports
from jaxprune.experiments import config as configs
from jaxprune.experiments.studies import jobs, methods

CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR")
pytestmark = pytest.mark.scripts  # the stand-in runs in child processes

# Behaves like train.py as far as a study can tell. A file beside the runs scripts its faults.
FAKE = """
import argparse, fcntl, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("config")
for name, kind in dict(method=str, sparsity=float, seed=int, workdir=str, steps=int).items():
    parser.add_argument(f"--{name}", type=kind)
args = parser.parse_args()
folder = pathlib.Path(args.workdir)
root = folder.parent
record = {
    "run": folder.name, "began": time.monotonic(),
    "threads": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
    "cache": os.environ.get("JAX_COMPILATION_CACHE_DIR"),
    "minimum": os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"),
}
with open(root / "calls.jsonl", "a") as file:
    file.write(json.dumps(record) + chr(10))
print("training", folder.name, flush=True)
fault = json.loads((root / "faults.json").read_text()).get(folder.name)
if fault == "fail":
    sys.exit(3)
if fault == "wait":  # until the study asks to stop
    def save(*_):
        (folder / "saved").write_text("")
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
if fault == "together":  # only two that run at once can end
    (folder / "here").write_text("")
    limit = time.monotonic() + 60
    while len(list(root.glob("*/here"))) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    assert len(list(root.glob("*/here"))) >= 2
dense = args.method == "none"
config = vars(args) | {"sparsity": 0.72 if dense else args.sparsity, "data_dir": str(args.seed)}
config["steps"] = 99 if fault == "other steps" else args.steps
(folder / "config.json").write_text(json.dumps(config))
lost = {"none": 0.0, "agip": 0.01, "random": 0.1, "gradient": 0.02, "magnitude": 0.03}
summary = {
    "test_accuracy": 0.9 + 0.02 * args.seed - lost[args.method] * (1 + args.seed),
    "sparsity": 0.0 if dense else args.sparsity, "dense_bytes": 4000,
    "sparse_bytes": 4000 if dense else 1250 + args.seed,
    "device": "1 x abacus", "versions": {"jax": "9.9", "flax": "8.8"},
}
(folder / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The script, with the stand-in; `study.go(...)` is one command in `study.root`."""
    module = types.SimpleNamespace()
    (tmp_path / "fake.py").write_text(FAKE)
    module.root = tmp_path / "study"
    module.root.mkdir()
    module.faults = lambda **faults: (module.root / "faults.json").write_text(
        json.dumps({name.replace("_", "-"): fault for name, fault in faults.items()})
    )
    module.faults()

    def go(*args):
        workdir = ["--workdir", str(module.root)]
        try:
            methods.main([*args[:1], *workdir, *args[1:]])
        except SystemExit as stopped:
            return stopped.code
        return 0

    module.go = go
    module.real_plot = reports.plot_accuracy
    monkeypatch.setattr(reports, "plot_accuracy", lambda *_: None)  # most of a short run's time
    module.real_train = methods.TRAIN
    monkeypatch.setattr(methods, "TRAIN", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return module


GRID = "fashion --methods agip random --sparsities 0.72 0.95".split()
STEPS = ["--", "--steps", "5"]


def _calls(study):
    path = study.root / "calls.jsonl"
    calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return calls


def _names(study):
    return [call["run"] for call in _calls(study)]


def _table(study):
    """(method, sparsity) -> cells of results.md by heading."""
    lines = [line for line in (study.root / "results.md").read_text().splitlines() if "|" in line]
    heading, _, *rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    rows = [dict(zip(heading, row)) for row in rows]
    return {(row["method"], row["sparsity"]): row for row in rows}


def test_runs_seed_by_seed_with_the_dense_one_first(study, capsys):
    assert study.go(*GRID, "--seeds", "3", "1", *STEPS) == 0
    first = ["agip-0.72", "random-0.72", "agip-0.95", "random-0.95"]
    expected = [f"{run}-seed{seed}" for seed in (3, 1) for run in ["none", *first]]
    calls = _calls(study)
    assert [call["run"] for call in calls] == expected
    assert {call["cache"] for call in calls} == {str(study.root / "compilation_cache")}
    assert {call["minimum"] for call in calls} == {"0"}
    assert {tuple(call["threads"]) for call in calls} == {tuple(sorted(os.sched_getaffinity(0)))}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("1/10  none-seed3  test accuracy 96.00%  ")
    assert lines[10].endswith("  0.0 minutes left")
    assert (study.root / "agip-0.72-seed1" / "log.txt").read_text() == "training agip-0.72-seed1\n"


@pytest.mark.slow
def test_numbers_are_means_deviations_and_ratios_to_the_same_seed(study, monkeypatch):
    monkeypatch.setattr(reports, "plot_accuracy", study.real_plot)
    assert study.go(*GRID, "--seeds", "0", "1", "2", *STEPS) == 0
    dense, agip = [0.9, 0.92, 0.94], [0.89, 0.9, 0.91]
    table = _table(study)
    assert list(table) == [
        ("none", "0.00%"), ("agip", "72.00%"), ("agip", "95.00%"),
        ("random", "72.00%"), ("random", "95.00%"),
    ]  # fmt: skip
    row = table["agip", "72.00%"]
    ratios = [a / b for a, b in zip(agip, dense)]
    assert ratios == pytest.approx([0.988889, 0.978261, 0.968085], abs=1e-6)
    assert row["runs"] == "3"
    assert row["accuracy"] == "90.00%"
    assert row["SD"] == "1.00%"  # not 0.82 %, the population's
    assert row["relative"] == "97.84%"  # not 97.83 %, the ratio of means
    assert row["relative SD"] == f"{statistics.stdev(ratios):.2%}" == "1.04%"
    assert row["measured sparsity"] == "72.00%"
    assert (row["sparse bytes"], row["dense bytes"]) == ("1,251", "4,000")
    assert table["none", "0.00%"]["accuracy"] == "92.00%"
    assert table["none", "0.00%"]["relative"] == "100.00%"
    records = [json.loads(line) for line in (study.root / "results.jsonl").read_text().splitlines()]
    assert len(records) == 15
    assert records[0]["target_sparsity"] == 0.72 and records[0]["test_accuracy"] == 0.89
    text = (study.root / "results.md").read_text()
    command = f"python scripts/study.py fashion --workdir {study.root} --methods agip random"
    for part in (command, "-- --steps 5", "1 x abacus", "jax 9.9, flax 8.8"):
        assert text.count(part) == 1, part
    assert (study.root / "results.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_has_no_deviation_and_no_dense_run_no_ratio(study):
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 0
    assert _table(study)["agip", "72.00%"]["relative SD"] == "-"
    (study.root / "none-seed0" / "summary.json").unlink()
    assert study.go("fashion", "--report-only") == 0
    table = _table(study)
    assert "none" not in {method for method, _ in table}
    assert table["agip", "72.00%"]["relative"] == "-"
    assert table["agip", "72.00%"]["accuracy"] == "89.00%"


def test_finished_runs_are_skipped_and_seeds_can_be_added(study, capsys):
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 0
    (study.root / "random-0.72-seed0" / "summary.json").unlink()
    _calls(study)
    assert study.go(*GRID, "--seeds", "0", "1", *STEPS) == 0
    assert _names(study)[:3] == ["random-0.72-seed0", "none-seed1", "agip-0.72-seed1"]
    assert "4 of 10 runs are finished already" in capsys.readouterr().out
    assert _table(study)["random", "72.00%"]["runs"] == "2"
    assert study.go(*GRID, "--seeds", "0", "1", *STEPS) == 0
    assert _calls(study) == []
    text = (study.root / "results.md").read_text()
    assert text.count("- command:") == 2


def test_goes_on_after_a_failure_and_names_it(study, capsys):
    study.faults(**{"agip_0.72_seed0": "fail"})
    assert "1 runs failed" in study.go(*GRID, "--seeds", "0", *STEPS)
    assert len(_names(study)) == 5
    text = capsys.readouterr().out
    log = study.root / "agip-0.72-seed0" / "log.txt"
    assert f"agip-0.72-seed0 FAILED with code 3; see {log}" in text
    assert ("agip", "72.00%") not in _table(study)
    study.faults()
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 0
    assert _names(study) == ["agip-0.72-seed0"]
    assert log.read_text() == "training agip-0.72-seed0\n" * 2


def test_jobs_run_at_once_on_cores_of_their_own(study):
    study.faults(**{"none_seed0": "together", "agip_0.72_seed0": "together"})
    cores = sorted(os.sched_getaffinity(0))
    assert study.go(*GRID, "--seeds", "0", "--jobs", "2", *STEPS) == 0
    shares = {tuple(call["threads"]) for call in _calls(study)}
    if len(cores) > 1:
        assert shares == {tuple(cores[::2]), tuple(cores[1::2])}
    assert sorted(os.sched_getaffinity(0)) == cores


def test_a_stop_lets_the_run_save_and_the_same_command_goes_on(study, capsys):
    study.faults(**{"random_0.72_seed0": "wait"})
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 128 + 15
    assert _names(study) == ["none-seed0", "agip-0.72-seed0", "random-0.72-seed0"]
    assert (study.root / "random-0.72-seed0" / "saved").exists()
    text = capsys.readouterr().out
    assert "stopped; run the same command to resume" in text
    assert "FAILED" not in text
    assert len(_table(study)) == 2
    study.faults()
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 0
    assert _names(study)[0] == "random-0.72-seed0"


def test_a_run_that_another_process_trains_is_left_alone(study):
    import fcntl

    (study.root / "none-seed0").mkdir()
    with (study.root / "none-seed0" / "log.txt").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "another process is training" in study.go(*GRID, "--seeds", "0", *STEPS)
    assert _names(study) == []


def test_other_training_options_are_refused(study):
    assert "no finished run" in study.go("fashion", "--report-only")
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 0
    before = (study.root / "study.json").read_text()
    message = study.go(*GRID, "--seeds", "1", "--", "--steps", "7")
    assert "options: ['--steps', '5'] there, ['--steps', '7'] now" in message
    assert "use a different folder" in message
    assert (study.root / "study.json").read_text() == before
    assert len(_names(study)) == 5


def test_runs_with_other_configurations_are_not_mixed(study):
    study.faults(**{"agip_0.72_seed0": "other steps"})
    for arguments in ([*GRID, "--seeds", "0", *STEPS], ["fashion", "--report-only"]):
        message = study.go(*arguments)
        assert "steps: 99 there, 5 now" in message or "steps: 5 there, 99 now" in message
        assert "use a different folder" in message
        assert "agip-0.72-seed0" in message and "none-seed0" in message
        assert "data_dir" not in message and "seed:" not in message
    assert _names(study) == ["none-seed0", "agip-0.72-seed0"]
    assert list(_table(study)) == [("none", "0.00%")]


def test_a_mistyped_first_command_can_be_corrected(study):
    assert "runs failed" in study.go(*GRID, "--seeds", "0", "--", "--stpes", "5")
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 0


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ((), "CONFIG is missing"),
        (("a", "--sparsities", "1"), "--sparsities in [0, 1)"),
        (("a", "--sparsities", "nan"), "--sparsities in [0, 1)"),
        (("a", "--seeds", "-1"), "--seeds at least 0"),
        (("a", "--jobs", "0"), "--jobs must be at least 1"),
        (("a", "--methods", "none"), "invalid choice: 'none'"),
        (("a", "--steps", "5"), "--steps"),
        (
            ("a", "--", "--seed=3", "--overwrite"),
            "--overwrite, --seed may not be given",
        ),
    ],
)
def test_bad_options_are_named(study, args, part, capsys):
    with pytest.raises(SystemExit) as stopped:
        methods.main([*args])
    assert stopped.value.code == 2
    assert part in capsys.readouterr().err


def test_knows_every_method_of_the_training_script(study):
    field = {field.name: field.type for field in dataclasses.fields(configs.Config)}["method"]
    assert ["none", *methods.METHODS] == list(get_args(field))


def test_a_copy_of_a_run_is_not_one_more(study):
    assert study.go(*GRID, "--seeds", "0", *STEPS) == 0
    shutil.copytree(study.root / "agip-0.72-seed0", study.root / "agip-0.72-seed0.bak")
    assert study.go("fashion", "--report-only") == 0
    assert _table(study)["agip", "72.00%"]["runs"] == "1"


def test_real_runs(study, monkeypatch, environment):
    monkeypatch.setattr(reports, "plot_accuracy", study.real_plot)
    monkeypatch.setattr(methods, "TRAIN", study.real_train)
    monkeypatch.setenv("XLA_FLAGS", environment["XLA_FLAGS"])
    if CACHE:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", CACHE)
    arguments = "digits_resnet8 --methods agip --sparsities 0.72 --seeds 0".split()
    assert study.go(*arguments, *"-- --steps 3 --batch-size 16 --prune-every 1".split()) == 0
    row = _table(study)["agip", "72.00%"]
    assert row["runs"] == "1"
    assert row["measured sparsity"] == "72.00%"
    assert 0 < float(row["relative"].rstrip("%"))
    assert CACHE or list((study.root / "compilation_cache").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("none-seed0", "none-seed1", "none-seed0: --seed 1"),
        ("agip-0.72-seed0", "agip-0.95-seed0", "agip-0.72-seed0: --sparsity 0.95"),
        ("agip-0.72-seed0", "random-0.72-seed0", "agip-0.72-seed0: --method random"),
    ],
)
def test_a_folder_that_holds_another_run_than_its_name_says(name, other, message, study):
    assert study.go(*GRID, "--seeds", "0", "1", *STEPS) == 0
    shutil.rmtree(study.root / name)
    shutil.copytree(study.root / other, study.root / name)
    _calls(study)
    code = study.go(*GRID, "--seeds", "0", "1", *STEPS)
    assert "hold different runs from those that their names say" in code and message in code
    assert not _calls(study)


def test_logs_of_runs_are_not_written_through_a_link(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "log.txt").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="log.txt must be a file, but is a symbolic link to"):
        jobs.start([sys.executable, "-c", "print(1)"], tmp_path, "run")
    assert (tmp_path / "mine").read_text() == "mine"
