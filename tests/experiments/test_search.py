"""scripts/search.py on a small dense run, with a stand-in for the evaluation of candidates."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxprune import search, structure
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import Experiment
from jaxprune.experiments.studies import search as study
from jaxprune.experiments.studies import search_networks, search_results

SCRIPT = Path(__file__).parents[2] / "scripts" / "search.py"
TRAINING = shlex.split(
    "digits_resnet8 --method none --steps 20 --batch-size 16 --eval-batch-size 360 --log-every 20 "
    "--validation 200"
)
OPTIONS = shlex.split("--evaluations 14 --seeds 0 1 --retrain --steps 4 --calibration 0")
SEEDED = ["random", "cross_entropy", "amc"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense(environment, tmp_path_factory):
    """The workdir of a finished dense run."""
    workdir = tmp_path_factory.mktemp("dense")
    words = [
        sys.executable,
        "-m",
        "jaxprune.experiments.train",
        *TRAINING,
        "--workdir",
        str(workdir),
    ]
    subprocess.run(words, env=environment, check=True, capture_output=True, timeout=300)
    return workdir


@pytest.fixture
def stand_in(monkeypatch):
    """Scores a candidate by its weights alone; returns the list of all evaluations."""
    evaluated = []

    @jax.jit
    def score(variables):
        own = [jnp.abs(leaf).sum() for leaf in jax.tree.leaves(variables["params"])]
        return jnp.tanh(sum(own) / 3000)

    def make(dense, count):
        assert count == 200  # the images that the dense run held out

        def evaluate(variables):
            evaluated.append(1)
            return score(variables)

        return evaluate

    monkeypatch.setattr(search_networks, "make_evaluate", make)
    return evaluated


def records(workdir):
    """What is reproducible of all records, by name."""
    own = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    times = {"seconds", "evaluate_seconds", "search_seconds"}
    return {x["name"]: {k: v for k, v in x.items() if k not in times} for x in own}


def test_searches_are_compared_and_a_killed_one_resumes(dense, stand_in, tmp_path, monkeypatch):
    names = ["uniform", "ranking", "knapsack", "greedy", *SEEDED]
    words = [str(dense), "--searches", *names, *OPTIONS]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study.main([*words, "--workdir", str(whole)])
    found = records(whole)
    assert len(found) == 4 + 2 * 3
    for own in found.values():
        assert own["share"] <= 0.5 and own["held_out"] and 0 <= own["accuracy_before"] <= 1
        plan = structure.load_plan(whole / own["name"] / "plan.json")
        assert structure.count_parameters(plan) == own["parameters"]
    text = (whole / "results.md").read_text()
    assert (
        "| cross_entropy | 0.5 | 2 | 14 |" in text and "command: `python scripts/search.py" in text
    )
    assert (whole / "searches-0.5.png").read_bytes()[1:4] == b"PNG"
    count = len(stand_in)

    class Killed(BaseException):
        pass

    original = search.Evaluation

    def kill(*args, **options):
        if len(stand_in) == count + 20:
            raise Killed
        return original(*args, **options)

    monkeypatch.setattr("jaxprune.search._runs.Evaluation", kill)
    with pytest.raises(Killed):
        study.main([*words, "--workdir", str(killed)])
    monkeypatch.setattr("jaxprune.search._runs.Evaluation", original)
    study.main([*words, "--workdir", str(killed)])
    assert records(killed) == found
    assert len(stand_in) - count <= count + 1  # nothing else was evaluated again

    before = len(stand_in)
    study.main([*words, "--workdir", str(whole)])  # finished: only the results are written again
    assert len(stand_in) == before
    assert search_results.write_results(whole, [*study.SEARCHES])


def test_latencies_are_measured_once(dense, stand_in, tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(
        "jaxprune.search._latencies.time_layer",
        lambda layer, c, n: timed.append(layer.path) or 1e-9 * c * n * layer.k**2 * layer.h,
    )
    words = [str(dense), "--searches", "uniform", *OPTIONS, "--cost", "latency", "--batch", "2"]
    words += ["--workdir", str(tmp_path)]
    study.main(words)
    count = len(timed)
    assert count and (tmp_path / "latencies-2.json").exists()
    study.main([*words, "--budgets", "0.5", "0.7"])
    assert len(timed) == count
    own = records(tmp_path)["uniform-0.7-run0-seed0"]
    assert own["share"] <= 0.7 and len(own["latency_errors"]) == 3
    assert "sum of the table of latencies" in (tmp_path / "results.md").read_text()


def test_what_is_found_is_trained_further(dense, tmp_path):
    """Without the stand-in: real accuracies, reconstruction, and all ways of training."""
    words = [str(dense), "--searches", "uniform", "scratch", "--steps", "4", "--rewind-steps", "4"]
    study.main([*words, "--calibration", "60", "--workdir", str(tmp_path)])
    own = records(tmp_path)
    assert set(own["uniform-0.5-run0-seed0"]["accuracies"]) == {"fine_tune", "rewind"}
    assert set(own["scratch-0.5-run0-seed0"]["accuracies"]) == {"scratch"}
    assert own["scratch-0.5-run0-seed0"]["widths"] == own["uniform-0.5-run0-seed0"]["widths"]


@pytest.mark.parametrize(("model", "groups"), [("mobilenet_v1", 14), ("mobilenet_v2", 25)])
def test_networks_for_phones_are_models_of_runs(model, groups):
    experiment = Experiment(Config(model=model, method="none", granularity="channels"))
    assert len(experiment.groups) == groups
    assert experiment.macs(experiment.groups.plan({})) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budgets", "1.5"], "--budgets must lie in"),
        (["--evaluations", "0"], "must be at least 1"),
        (["--searches", "best"], "invalid choice"),
    ],
)
def test_bad_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        study.main(["runs/a", *words])
    assert message in capsys.readouterr().err


def test_the_door_opens(environment):
    words = [sys.executable, str(SCRIPT), "--report-only", "--workdir", "/nowhere"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "holds no finished run" in done.stderr
