"""scripts/elastic.py: a tiny study that is stopped and resumed, and what its results say."""

import json
import os
import shlex
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from jaxprune import elastic, storage
from jaxprune.experiments.config import Config
from jaxprune.experiments.studies import elastic as study
from jaxprune.experiments.studies import elastic_networks as networks
from jaxprune.experiments.studies import elastic_results

TINY = shlex.split(
    "--tiny --budgets 0.8 --controls short --steps 6 --tune-steps 2 --measured 6 --networks 1"
)


def records(workdir):
    """What is reproducible of all records, by name."""
    lines = (workdir / "results.jsonl").read_text().splitlines()
    own = [json.loads(line) for line in lines]
    return {x["name"]: {k: v for k, v in x.items() if k != "seconds"} for x in own}


@pytest.fixture
def counted(monkeypatch):
    """Counts evaluations of choices and steps of the elastic training; may stop after some."""
    count = {"choices": 0, "logs": 0, "stop": None}
    real = networks.train_supernet

    def train(options, own, folder, on_log, stopped):
        def counting(step, values):
            count["logs"] += 1
            on_log(step, values)

        supernet = real(options, own, folder, counting, stopped)

        def evaluate(choice):
            if count["choices"] == count["stop"]:
                os.kill(os.getpid(), signal.SIGTERM)
            count["choices"] += 1
            return supernet.evaluate(choice)

        return supernet._replace(evaluate=evaluate)

    monkeypatch.setattr(networks, "train_supernet", train)
    return count


@pytest.mark.slow
def test_a_stopped_study_resumes_and_ends_with_the_same_numbers(counted, tmp_path, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    study.main([*TINY, "--workdir", str(whole)])
    total = counted["choices"]
    assert counted["logs"] > 0
    checkpoints = "elastic-seed0/checkpoints"  # tests/elastic stops the training itself
    shutil.copytree(whole / checkpoints, stopped / checkpoints)
    counted.update(choices=0, logs=0, stop=3)
    with pytest.raises(SystemExit) as ended:
        study.main([*TINY, "--workdir", str(stopped)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert not (stopped / "results.md").exists()
    counted.update(stop=None)
    study.main([*TINY, "--workdir", str(stopped)])
    assert counted == {"choices": total, "logs": 0, "stop": None}  # nothing was done twice
    found = records(stopped)
    assert found == records(whole)
    assert sorted(found) == ["cut-0.8-seed0", "short-0.8-seed0"]
    cut, short = found["cut-0.8-seed0"], found["short-0.8-seed0"]
    assert cut["choice"] == short["choice"] and cut["share"] <= 0.8
    assert cut["parameters"] == short["parameters"]
    assert (cut["steps"], short["steps"]) == (2, 6)
    # The file has the module of those widths.
    variables, _ = storage.load(stopped / "cut-0.8-seed0" / "network.npz")
    sizes = [np.size(leaf) for leaf in _leaves(variables["params"])]
    assert sum(sizes) == cut["parameters"]
    text = (stopped / "results.md").read_text()
    assert "the elastic network pays" in text and "predictor on unseen choices" in text
    assert (stopped / "fronts.png").read_bytes()[1:4] == b"PNG"
    # A finished study trains nothing, and others are refused.
    study.main([*TINY, "--workdir", str(stopped)])
    assert counted["choices"] == total
    with pytest.raises(SystemExit, match="steps.*6"):
        study.main([*TINY, "--steps", "7", "--workdir", str(stopped)])
    capsys.readouterr()


def _leaves(tree):
    return [x for own in tree.values() for x in (_leaves(own) if isinstance(own, dict) else [own])]


@pytest.mark.slow
def test_what_is_cut_out_computes_what_was_judged(tmp_path):
    options = study.parse([*TINY, "--workdir", str(tmp_path)])
    own = networks.open_study(options, 0)
    supernet = networks.train_supernet(options, own, tmp_path / "elastic", lambda *_: None, [])
    # Judged on the test images, so that both sides see the same.
    pairs = [(x, own.dataset.test.labels[i * 250 : (i + 1) * 250])
             for i, x in enumerate(networks.batches_of(own, own.dataset.test.images))]  # fmt: skip
    assert own.space.train is not None
    judge = elastic.make_accuracy(
        own.space, own.space.train, own.space.evaluate, supernet.trained.variables,
        calibration=supernet.calibration, batches=pairs,
    )  # fmt: skip
    for choice in (elastic.smallest(own.space.decisions), elastic.largest(own.space.decisions)):
        cut = networks.cut_out(supernet, choice)
        assert networks.test_accuracy(own, cut) == pytest.approx(judge(choice), abs=0.006)
        alone = networks.from_scratch(own, choice, seed=1)
        shapes = [[x.shape for x in _leaves(networks.variables_of(net.module)["params"])]
                  for net in (cut, alone)]  # fmt: skip
        assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "mbconv"])
def test_a_fresh_network_has_the_shape_of_the_one_cut_out(name):
    space = elastic.named(name, image_size=8)
    choice = tuple(0 if own.kind == "depth" else len(own.options) // 2 for own in space.decisions)
    extracted = elastic.extract(space, space.variables, choice)
    module = elastic.to_module(space, extracted)
    fresh = networks.fresh(module, extracted.description, seed=5)
    one, two = (networks.variables_of(own)["params"] for own in (module, fresh))
    assert [x.shape for x in _leaves(one)] == [x.shape for x in _leaves(two)]
    first = np.asarray(one["stem"]["conv"]["kernel"])
    assert not np.array_equal(first, two["stem"]["conv"]["kernel"])


@pytest.mark.slow
def test_a_budget_that_no_choice_meets_is_refused_before_training(counted, tmp_path):
    with pytest.raises(SystemExit, match=r"`budgets` 0.1 are met by no choice.*blocks/0"):
        study.main([*TINY, "--budgets", "0.8", "0.1", "--workdir", str(tmp_path)])
    assert counted["logs"] == 0


@pytest.mark.slow
def test_added_budgets_keep_the_choices_of_the_earlier_ones(tmp_path):
    decisions = tuple(elastic.Decision(name, "width", (1, 2, 3)) for name in "abc")
    cost = lambda choice: 1 + sum(choice)  # noqa: E731
    own = networks.Study(
        Config(), None, None, SimpleNamespace(decisions=decisions), (), elastic.Recipe(), cost,
        cost, cost, None,
    )  # fmt: skip
    evaluated = []

    def evaluate(choice):
        evaluated.append(choice)
        return 0.5 + 0.01 * sum(choice)

    supernet = networks.Supernet(own, elastic.Trained(None, None, ()), "abc", evaluate, None, [])
    options = study.parse(["--tiny", "--workdir", str(tmp_path)])
    (tmp_path / "elastic-seed0").mkdir()
    first = study.choices_of(options, supernet, {"x": ("cut", 0.5)}, [])
    assert first[0.5]["cost"] <= 0.5 * 7
    cells = {"x": ("cut", 0.5), "y": ("cut", 0.8), "z": ("long", 0.8)}
    both = study.choices_of(options, supernet, cells, [])
    assert len(set(evaluated)) == len(evaluated)  # the journal has the earlier ones
    assert both[0.5] == json.loads(json.dumps(first[0.5])) and both[0.8]["share"] == 0.8
    count = len(evaluated)
    again = study.choices_of(options, supernet, cells, [])
    assert [tuple(again[own]["choice"]) for own in (0.5, 0.8)] == [
        tuple(both[own]["choice"]) for own in (0.5, 0.8)
    ]
    assert len(evaluated) == count  # nothing is searched again
    front = json.loads((tmp_path / "elastic-seed0" / "front.json").read_text())
    assert [point["share"] for point in front["points"]] == [0.5, 0.8]
    assert front["search_passes"] == count * (options.calibration + options.judged)


def test_parse(capsys):
    options = study.parse(["digits", "resnet8", "--steps", "100", "--budgets", "0.5", "0.9", "0.5"])
    assert (options.short_steps, options.tune_rate) == (50, 0.01)
    assert [*study.cells_of(options, 3)] == [
        f"{kind}-{own}-seed3" for own in ("0.9", "0.5") for kind in ("cut", "short", "long")
    ]
    for words, why in [(["--budgets", "1.5"], "(0, 1]"), (["--tune-steps", "0"], "--tune-steps")]:
        with pytest.raises(SystemExit):
            study.parse(words)
        assert why in capsys.readouterr().err
    tiny = study.parse(["--tiny", "--steps", "7"])
    assert (tiny.dataset, tiny.steps, tiny.measured) == ("digits", 7, 8)


# ---- results


def a_network(kind, budget, seed, accuracy, **changes):
    return {
        "name": f"{kind}-{budget:g}-seed{seed}", "kind": kind, "budget": budget, "seed": seed,
        "share": budget, "score": 0.8, "predicted": 0.81, "macs": 1000 * budget, "full_macs": 1000,
        "parameters": 50, "accuracy": accuracy, "steps": 10, "device": "1 x cpu",
        "accuracy_before": accuracy - 0.1 if kind == "cut" else None,
        "passes": {"cut": 30.0, "short": 60.0, "long": 90.0}[kind],
    } | changes  # fmt: skip


def write(workdir, networks, front):
    for own in networks:
        folder = workdir / own["name"]
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(own))
    folder = workdir / "elastic-seed0"
    folder.mkdir()
    (folder / "front.json").write_text(json.dumps(front))


FRONT = {
    "seed": 0, "spearman": 0.9, "kendall": None, "error": 0.01, "full_macs": 1000,
    "training_passes": 200.0, "search_passes": 10.0,
    "phases": [{"name": "full", "full_accuracy": 0.9, "smallest_accuracy": 0.1}],
}  # fmt: skip


def test_results_are_means_over_seeds(tmp_path):
    runs = [a_network("cut", 0.5, seed, 0.8 + 0.02 * seed) for seed in (0, 1)]
    runs += [a_network("long", 0.5, 0, 0.85), a_network("cut", 0.9, 0, 0.95)]
    write(tmp_path, runs, FRONT)
    rows = elastic_results.write_results(tmp_path)
    assert [row["budget"] for row in rows] == [0.9, 0.5]
    assert rows[1]["tuned"] == pytest.approx(0.81) and rows[1]["cut"] == pytest.approx(0.71)
    assert rows[1]["tuned SD"] == pytest.approx(0.02 / 2**0.5)
    assert rows[1]["long"] == 0.85 and rows[0]["long"] is None and rows[0]["short"] is None
    text = (tmp_path / "results.md").read_text()
    assert "| 0.5 | 2 | 50.0% | 50 | 81.00% | 80.00% | 71.00% |" in text
    assert "spearman 0.900, kendall -, error 1.00%" in text


def test_costs_count_the_elastic_training_once(tmp_path):
    runs = [a_network(kind, 0.5, 0, 0.8) for kind in ("cut", "short", "long")]
    write(tmp_path, runs, FRONT)
    elastic_results.write_results(tmp_path)
    text = (tmp_path / "results.md").read_text()
    # Once 210,000; a budget costs 15,000 after it, and 30,000 or 45,000 alone.
    assert "elastic training 2e+05, search 1e+04, fine-tuning 1.5e+04 a budget" in text
    assert "alone, short: 3e+04 a budget; the elastic network pays from 15 budgets on" in text
    assert "alone, long: 4.5e+04 a budget; the elastic network pays from 8 budgets on" in text


def test_a_step_costs_three_passes_for_each_sub_network_and_one_for_the_teacher():
    space = elastic.named("resnet8", image_size=8)
    phases = elastic.phases(space.decisions, 30, networks=2)
    own = networks.Study(*[None] * 4, phases, elastic.Recipe(batch_size=8), *[None] * 4)
    expected = sum(8 * p.steps * (3 * p.networks + (p.name != "full")) for p in phases)
    assert networks.passes_of_training(own) == expected


def test_a_damaged_record_is_refused(tmp_path):
    write(tmp_path, [a_network("short", 0.5, 0, "good")], FRONT)
    with pytest.raises(ValueError, match="summary.json.*accuracy"):
        elastic_results.write_results(tmp_path)
