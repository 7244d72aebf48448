"""scripts/compact.py as a user runs it: its networks, killed, stopped, resumed, refused."""

import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxprune import (
    checkpoints,
    data,
    files,
    models,
    reports,
    sharding,
    storage,
    structure,
    training,
)
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.experiments.network import pure_functions
from jaxprune.experiments.studies import compaction, compaction_results, networks

SCRIPT = Path(__file__).parents[2] / "scripts" / "compact.py"
TRAINING = shlex.split(
    "digits_resnet8 --method none --steps 30 --batch-size 16 --eval-batch-size 360 --log-every 30"
)
OPTIONS = shlex.split("--scores l1 taylor --budgets 0.5 --steps 4 --score-batches 2")
CELLS = ["dense-seed0", "l1-0.5-seed0", "scratch-0.5-seed0", "taylor-0.5-seed0"]
TIMES = {"seconds", "seconds_per_step", "dense_seconds_per_step"}


@pytest.fixture(scope="module")
def dense(environment, tmp_path_factory):
    """The workdir of a finished dense run."""
    workdir = tmp_path_factory.mktemp("dense")
    command = [
        sys.executable,
        "-m",
        "jaxprune.experiments.train",
        *TRAINING,
        "--workdir",
        str(workdir),
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    return workdir


@pytest.fixture(scope="module")
def finished(dense, environment, tmp_path_factory):
    """The folder of a comparison that nothing interrupted, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, finish(dense, workdir, environment)


@pytest.fixture
def script(capsys):
    """The command in this process; `go(...)` returns its exit code and what it printed."""

    def go(*args):
        try:
            compaction.main([str(arg) for arg in args])
            code = 0
        except SystemExit as stop:
            code = stop.code
        shown = capsys.readouterr()
        return code, f"{shown.out}{shown.err}{code}"

    return types.SimpleNamespace(go=go)


def start(dense, workdir, environment):
    command = [sys.executable, str(SCRIPT), str(dense), *OPTIONS, "--workdir", str(workdir)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def finish(dense, workdir, environment):
    process = start(dense, workdir, environment)
    text, _ = process.communicate(timeout=500)
    assert process.returncode == 0, text
    return text


def records(workdir):
    """Name -> record of each network, without times."""
    lines = (workdir / "results.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    return {run["name"]: {k: v for k, v in run.items() if k not in TIMES} for run in runs}


def saved_networks(workdir):
    return {path.parent.name: storage.load(path)[0] for path in workdir.glob("*/network.npz")}


def test_networks_of_another_training_are_refused(dense, finished, script, tmp_path):
    """The dense run was trained again: same configuration and folder, other weights."""
    again = tmp_path / dense.name
    shutil.copytree(dense, again)
    record = json.loads((again / "checkpoints" / "30" / "record" / "metadata").read_text())
    path = sorted(record["leaves"])[0]
    record["leaves"][path][-1] += 1  # the checksum of a leaf
    record = files.seal({name: record[name] for name in ("record", "leaves")})
    (again / "checkpoints" / "30" / "record" / "metadata").write_text(json.dumps(record))
    before = records(finished[0])
    code, text = script.go(again, *OPTIONS, "--workdir", finished[0])
    assert code and "were made from a different training of the same configuration" in text
    assert all(str(finished[0] / name) in text for name in CELLS)
    assert records(finished[0]) == before
    assert script.go(dense, *OPTIONS, "--workdir", finished[0])[0] == 0


# ---- what it makes


def test_each_score_and_control_is_a_network_within_the_budget(finished):
    workdir, text = finished
    runs = records(workdir)
    assert list(runs) == CELLS
    whole = runs["dense-seed0"]
    assert whole["macs"] == whole["dense_macs"] == 763_520
    assert (whole["parameters"], whole["budget"]) == (77_754, 1.0)
    for name in CELLS[1:]:
        assert 0.4 * 763_520 < runs[name]["macs"] <= 0.5 * 763_520
        assert runs[name]["parameters"] < 77_754
    assert runs["scratch-0.5-seed0"]["widths"] == runs["l1-0.5-seed0"]["widths"]
    assert runs["scratch-0.5-seed0"]["accuracy_before"] is None
    assert runs["taylor-0.5-seed0"]["widths"] != runs["l1-0.5-seed0"]["widths"]
    assert 0 < runs["l1-0.5-seed0"]["difference"] < 1e-5
    assert {path.name for path in (workdir / CELLS[1]).iterdir()} == {
        "plan.json", "network.npz", "summary.json",
    }  # fmt: skip
    assert [line.split("  ")[:2] for line in text.splitlines()[1:5]] == [
        [f"{number}/4", name]
        for number, name in enumerate((CELLS[0], CELLS[1], CELLS[3], CELLS[2]), start=1)
    ]
    assert text.splitlines()[4].endswith("  0.0 minutes left")
    table = (workdir / "results.md").read_text()
    assert table in text and shlex.join(OPTIONS) in table
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def opened(dense):
    """The trained network as the script sees it."""
    config = json.loads((dense / "config.json").read_text())
    config = Config(**{k: v for k, v in config.items() if k not in ("resolved_steps", "format")})
    return networks.read_dense(dense, config)


def test_before_training_it_is_the_dense_network_with_zeros(finished, opened):
    before = {name: run["accuracy_before"] for name, run in records(finished[0]).items()}
    state = opened.state
    assert before["dense-seed0"] > 0.2
    for name in ("dense-seed0", "l1-0.5-seed0", "taylor-0.5-seed0"):
        file = finished[0] / name / "plan.json"
        plan = structure.load_plan(file) if file.exists() else opened.experiment.groups.plan({})
        zeros = plan.mask(networks.variables_of(state))
        masked = state._replace(params=zeros["params"], model_state=zeros["model_state"])
        accuracy = opened.experiment.dense.evaluate(masked)["test_accuracy"]
        assert accuracy == pytest.approx(before[name], abs=1.5 / 360)  # one image more or less


def test_files_are_enough_to_run_it_and_to_rebuild_it(finished, opened):
    workdir, _ = finished
    images = opened.experiment.source.prepare(opened.experiment.source.test.images)
    for name in ("l1-0.5-seed0", "scratch-0.5-seed0"):
        record = records(workdir)[name]
        widths = models.Widths(**record["widths"])
        model = models.resnet8(in_channels=1, widths=widths, rngs=nnx.Rngs(3))
        params, rest = map(nnx.to_pure_dict, nnx.state(model, nnx.Param, ...))
        like = {"params": params, "model_state": rest}
        small, _ = storage.load(workdir / name / "network.npz", like)
        for part in small.values():
            nnx.update(model, part)
        model.eval()
        logits = nnx.jit(type(model).__call__)(model, images)
        accuracy = float(np.mean(jnp.argmax(logits, -1) == opened.experiment.source.test.labels))
        assert accuracy == pytest.approx(record["accuracy"], abs=1.5 / 360)
        if name != "scratch-0.5-seed0":
            plan = structure.load_plan(workdir / name / "plan.json")
            wrapped = jax.jit(plan.wrap(opened.experiment.functions.evaluate))
            np.testing.assert_allclose(wrapped(small, images), logits, rtol=1e-4, atol=1e-5)


def test_momentum_is_sliced_and_the_schedule_begins_anew(opened):
    plan = networks.choose(opened, "l2", 0.5, floor=0.1, multiple=1, batches=1)
    small = networks.compacted(opened, plan)
    [trace] = [s.trace for s in jax.tree.leaves(small.state.opt_state, is_leaf=is_trace)
               if is_trace(s)]  # fmt: skip
    path = "params/blocks/1/conv1/kernel"
    whole = plan.model.shapes[path]
    kernel = trace["blocks"][1]["conv1"]["kernel"]
    assert kernel.shape == plan.shape(path) != whole and float(jnp.abs(kernel).max()) > 0
    counts = optax.tree.get_all_with_path(small.state.opt_state, "count")
    assert [int(count) for _, count in counts] == [0]
    assert int(small.state.step) == 0


def test_training_goes_on_with_the_batches_that_come_next(opened, monkeypatch):
    assert opened.next_batch == {"next_index": 30}
    seen = []

    def fit(state, stop, run, split, batches, key, mesh, **options):
        seen.append((stop, batches.get_state(), next(batches).tolist(), options["chunk"]))
        return state

    monkeypatch.setattr(training, "fit", fit)
    networks.fine_tune(opened, networks.unpruned(opened), [])
    batches = data.index_batches(opened.experiment.source.size, 16, seed=0)
    order = [next(batches).tolist() for _ in range(31)]
    assert seen == [(30, {"next_index": 30}, order[30], 1)]


def is_trace(node):
    return isinstance(node, optax.TraceState)


def test_scores_are_those_of_the_network(opened):
    groups, variables = opened.experiment.groups, networks.variables_of(opened.state)
    found = {name: networks.channel_scores(opened, name, 2) for name in networks.SCORES}
    for name, order in (("l1", 1), ("l2", 2), ("linf", np.inf)):
        wanted = structure.filter_norms(groups, variables, order)
        jax.tree.map(np.testing.assert_array_equal, found[name], wanted)
    assert all(set(own) == set(groups) for own in found.values())
    texts = {json.dumps({k: v.tolist() for k, v in own.items()}) for own in found.values()}
    assert len(texts) == len(found)  # no two are the same


def test_gradients_are_means_over_training_images_in_evaluation(opened):
    found = networks.mean_gradients(opened, 3)
    images, labels = opened.experiment.source.train
    batches = data.index_batches(len(labels), 16, seed=0)
    rows = np.concatenate([next(batches) for _ in range(3)])
    inputs = opened.experiment.source.prepare(jnp.asarray(images[rows]))

    def loss(params):
        variables = {"params": params, "model_state": opened.state.model_state}
        logits = opened.experiment.functions.evaluate(variables, inputs)
        return training.cross_entropy(logits, labels[rows]).mean()

    wanted = jax.jit(jax.grad(loss))(opened.state.params)
    close = {"rtol": 1e-3, "atol": 1e-5}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), found["params"], wanted)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found["model_state"]))


@pytest.mark.slow
def test_a_function_in_the_place_of_a_module_trains_the_same():
    mesh, tx = sharding.make_mesh(devices=jax.devices()[:1]), optax.sgd(0.1, momentum=0.9)
    thin = models.Widths(2, ((2, 2), (3, 4), (3, 4)))
    model = models.resnet8(in_channels=1, widths=thin, rngs=nnx.Rngs(0))
    graphdef, state = training.create_state(model, tx, mesh)
    functions = pure_functions(model)
    evaluate, train = functions.evaluate, functions.train

    def both(params, model_state, images):
        logits, new = train({"params": params, "model_state": model_state}, images)
        return logits, new["model_state"]

    def logits(params, model_state, images):
        return evaluate({"params": params, "model_state": model_state}, images)

    batch = np.ones((4, 8, 8, 1), np.uint8) * np.arange(4, dtype=np.uint8)[:, None, None, None]
    labels = np.arange(4)
    steps = [
        jax.jit(training.make_train_step(each, tx, lambda key, images: images / 2.0))
        for each in (graphdef, both)
    ]
    ends = [step(state, batch, labels, jax.random.key(0)) for step in steps]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    split = data.Split(jnp.asarray(batch), jnp.asarray(labels))
    tests = [
        training.make_evaluate(each, lambda images: images / 2.0, mesh)(ends[0][0], split, 3)
        for each in (graphdef, logits)
    ]
    assert tests[0] == tests[1]


# ---- killed, stopped, resumed


def test_killed_and_stopped_it_skips_what_is_done_and_ends_the_same(
    finished, dense, environment, tmp_path
):
    process = start(dense, tmp_path, environment)
    limit = time.monotonic() + 400
    while not (tmp_path / CELLS[0]).exists() and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = (tmp_path / CELLS[0] / "summary.json").read_text()
    # What a kill can leave of a cell that was being written.
    shutil.copytree(finished[0] / CELLS[1], tmp_path / f".{CELLS[1]}.partial")

    seen = []
    with start(dense, tmp_path, environment) as process:
        for line in process.stdout:
            seen.append(line)
            if line.startswith("2/4"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert seen[0].startswith("1 of 4 networks are finished")
    assert "stopped; run the same command to resume\n" in seen
    assert [*records(tmp_path)] == CELLS[:2]
    assert (tmp_path / CELLS[0] / "summary.json").read_text() == done

    text = finish(dense, tmp_path, environment)
    assert text.startswith("2 of 4 networks are finished")
    assert records(tmp_path) == records(finished[0])
    ours, theirs = saved_networks(tmp_path), saved_networks(finished[0])
    assert ours.keys() >= theirs.keys()
    for name, tree in theirs.items():
        jax.tree.map(np.testing.assert_array_equal, ours[name], tree)


def test_what_is_finished_is_not_trained_again(finished, dense, script, monkeypatch):
    workdir, _ = finished
    monkeypatch.setattr(compaction, "read_dense", None)  # would raise
    before = (workdir / "results.jsonl").read_text()
    (workdir / "results.md").unlink()
    code, text = script.go(dense, *OPTIONS, "--workdir", workdir)
    assert code == 0 and "4 of 4 networks are finished already" in text
    assert (workdir / "results.jsonl").read_text() == before
    (workdir / "results.md").unlink()
    assert script.go("--report-only", "--workdir", workdir)[0] == 0
    assert (workdir / "results.md").exists()


# ---- its numbers


def run_of(score, budget, seed, accuracy, before=0.5, **more):
    name = f"{score}-{budget:g}-seed{seed}" if score != "dense" else f"dense-seed{seed}"
    own = {"name": name, "score": score, "budget": budget, "seed": seed, "accuracy": accuracy}
    own |= {"accuracy_before": before, "parameters": 1000 + seed, "macs": 480 + 10 * seed}
    own |= {"dense_macs": 1000, "seconds_per_step": 0.2, "dense_seconds_per_step": 0.4 + seed}
    own |= {"difference": 2e-7, "device": "1 x abacus", "versions": {"jax": "9.9"}}
    return own | more


def test_numbers_are_means_deviations_and_ratios_to_the_same_seed(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reports, "plot_compaction", lambda rows, path: drawn.append(rows))
    whole = {"macs": 1000, "seconds_per_step": 0.4, "dense_seconds_per_step": 0.4}
    runs = [
        *(run_of("dense", 1.0, seed, 0.9 + 0.02 * seed, **whole) for seed in range(3)),
        *(run_of("l1", 0.5, seed, 0.8 - 0.01 * seed, before=0.1 * seed) for seed in range(3)),
        run_of("scratch", 0.5, 0, 0.6, before=None),
        run_of("random", 0.25, 1, 0.46),
    ]
    for run in runs:
        folder = tmp_path / run["name"]
        folder.mkdir()
        checkpoints.write_json(folder / "summary.json", run)
    shutil.copytree(tmp_path / "l1-0.5-seed0", tmp_path / "l1-0.5-seed0.bak")
    shutil.copytree(tmp_path / "l1-0.5-seed0", tmp_path / ".l1-0.5-seed0.partial")
    rows = compaction_results.write_results(tmp_path, ["l1", "random"])
    assert drawn == [rows]
    named = [("none", 1.0), ("l1", 0.5), ("scratch", 0.5), ("random", 0.25)]
    assert [(row["method"], row["budget"]) for row in rows] == named
    l1, ratios = rows[1], [0.8 / 0.9, 0.79 / 0.92, 0.78 / 0.94]
    assert l1["runs"] == 3
    assert l1["accuracy"] == pytest.approx(0.79) and l1["SD"] == pytest.approx(0.01)
    assert l1["before"] == pytest.approx(0.1) and l1["before SD"] == pytest.approx(0.1)
    assert l1["relative"] == pytest.approx(statistics.mean(ratios))
    assert l1["relative SD"] == pytest.approx(statistics.stdev(ratios))
    assert l1["macs"] == pytest.approx(0.49) and l1["ratio"] == pytest.approx(0.2 / 1.4)
    text = (tmp_path / "results.md").read_text().splitlines()
    cells = [cell.strip() for cell in text[3].strip("|").split("|")]
    assert cells == [
        "l1", "0.5", "3", "1,001", "490", "10.00%", "10.00%", "79.00%", "1.00%",
        f"{statistics.mean(ratios):.2%}", f"{statistics.stdev(ratios):.2%}", "0.200", "0.14",
    ]  # fmt: skip
    scratch = [cell.strip() for cell in text[4].strip("|").split("|")]
    assert scratch[5:9] == ["-", "-", "60.00%", "-"]
    assert rows[3]["relative"] == pytest.approx(0.5)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(runs)


# ---- refused


def fake(folder, **changes):
    """What a finished dense run leaves, as far as its configuration is read."""
    folder.mkdir(parents=True)
    config = vars(CONFIGS["digits_resnet8"][1]) | {"method": "none", "resolved_steps": 4}
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "summary.json").write_text("{}")
    return folder


def test_runs_that_cannot_be_compared_are_all_named(script, tmp_path):
    runs = [
        fake(tmp_path / "a"),
        fake(tmp_path / "b", seed=1, batch_size=7, data_dir="elsewhere"),
        fake(tmp_path / "c", seed=2, method="agip"),
        fake(tmp_path / "d", seed=3),
        fake(tmp_path / "e"),
        tmp_path / "f",
    ]
    (runs[3] / "summary.json").unlink()
    code, text = script.go(*runs, "--workdir", tmp_path / "out")
    assert code not in (0, None) and "Traceback" not in text
    for problem in (
        "must be finished, dense and differ only in their seeds",
        f"{runs[1]}: batch_size is 7, but 64 in {runs[0]}",
        f"{runs[2]}: is pruned (agip); train with --method none",
        f"{runs[3]}: is not finished",
        f"{runs[4]}: has seed 0, as an earlier one has",
        f"{runs[5]}: holds no run of scripts/train.py",
    ):
        assert problem in text
    assert "data_dir" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "RUN is missing"),
        (["run", "--scores", "l3"], "invalid choice: 'l3'"),
        (["run", "--budgets", "0.5", "1"], "--budgets must lie in (0, 1)"),
        (["run", "--steps", "0"], "--steps, --score-batches and --multiple must be at least 1"),
        (["run", "--steps", "9", "--warmup-steps", "9"], "--warmup-steps less than --steps"),
        (["--report-only"], "holds no finished run to report"),
    ],
)
def test_refusals(args, message, script, tmp_path):
    code, text = script.go(*args, "--workdir", tmp_path / "a")
    assert code not in (0, None)
    assert message in text


def test_a_workdir_of_another_comparison_is_refused(finished, dense, script, tmp_path):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    for own in (["--steps", "5"], ["--floor", "0.2"], ["--learning-rate", "9"]):
        code, text = script.go(dense, *OPTIONS, "--workdir", workdir, *own)
        assert "holds a run with a different configuration" in text
        assert own[0].lstrip("-").replace("-", "_") in text
    other = fake(tmp_path / "other", seed=1)
    assert "batch_size: 16 there, 64 now" in script.go(other, *OPTIONS, "--workdir", workdir)[1]
    assert (workdir / "config.json").read_text() == before


def test_a_budget_below_the_floors_is_refused(dense, script, tmp_path):
    code, text = script.go(dense, *OPTIONS, "--floor", "0.9", "--workdir", tmp_path)
    assert code not in (0, None) and "`limit`" in text and "lower `floor`" in text
