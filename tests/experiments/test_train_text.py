"""Decoders of text in scripts/train.py: every way to prune, resumed, and what a run leaves."""

import json
import math

import numpy as np
import pytest
import tyro

from jaxprune import storage, training, trees
from jaxprune.experiments import experiment, train
from jaxprune.experiments.ahead import steps as ahead
from jaxprune.experiments.config import CONFIGS
from jaxprune.experiments.studies import networks, rewinding
from jaxprune.experiments.studies import text as study

WIDTHS = {"width": 16, "layers": [[2, 1, 24], [2, 1, 24]]}
WORDS = "text_mini --steps 12 --batch-size 8 --length 16 --eval-batch-size 8 --eval-every 12"
WORDS = f"{WORDS} --save-every 6 --log-every 4 --warmup-steps 2 --prune-every 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a few kilobytes of text."""
    root = tmp_path_factory.mktemp("texts")
    words = np.random.default_rng(0).choice(["to ", "be ", "or ", "not ", "\n"], 3000)
    (root / "a.txt").write_text("".join(words))
    return root


@pytest.fixture
def run(folder, tmp_path):
    """`run(*options)`: the summary of a finished run in `tmp_path / "run"`."""

    def go(*more):
        words = [*WORDS, "--source-dir", str(folder), "--workdir", str(tmp_path / "run")]
        widths = [] if "--widths" in more else ["--widths", json.dumps(WIDTHS)]
        config = tyro.extras.overridable_config_cli(CONFIGS, args=[*words, *widths, *more])
        return train.train(config)

    return go


def leaves(workdir, step=12):
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(path.read_text())["leaves"]


@pytest.mark.slow
@pytest.mark.parametrize("scan", [[], ["--scan"]], ids=["list", "scan"])
@pytest.mark.parametrize("method", ["agip", "magnitude", "rigl", "snip", "straight_through"])
def test_layers_lose_weights_embedding_and_head_do_not(run, method, scan):
    summary = run("--method", method, "--sparsity", "0.75", "--init-images", "16", *scan)
    kernels = 2 * (16 * 64 + 2 * 16 * 32 + 64 * 16 + 3 * 16 * 24)
    kept = summary["nonzeros"] - (summary["parameters"] - kernels)
    assert abs(kept - kernels / 4) <= 14  # whole weights in each of 14 kernels
    assert summary["sparsity"] == pytest.approx(0.75, abs=14 / kernels)
    assert summary["widths"] == WIDTHS


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=4,fsdp=2"])
def test_a_run_reports_bits_per_byte_and_resumes_to_the_bit(run, tmp_path, mesh):
    options = "--method", "agip", "--sparsity", "0.5", "--remat", "--scan", "--mesh", mesh
    summary, workdir = run(*options), tmp_path / "run"
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (found,) = (record["bits_per_byte"] for record in records if "bits_per_byte" in record)
    assert found == pytest.approx(summary["test_loss"] / math.log(2), rel=1e-6)
    assert 0 < found < 8.5
    whole = leaves(workdir)
    for name in ("summary.json", "checkpoints/12"):
        path = workdir / name
        path.unlink() if path.is_file() else path.rename(tmp_path / "gone")
    assert run(*options)["test_loss"] == summary["test_loss"]
    assert leaves(workdir) == whole


@pytest.mark.slow
@pytest.mark.parametrize("scan", [[], ["--scan"]], ids=["list", "scan"])
def test_two_of_four_weights_stay_in_every_layer(run, scan):
    summary = run("--method", "agip", "--pattern", "2:4", "--sparsity", "0.5", *scan)
    assert summary["sparsity"] == 0.5 and summary["widths"] == WIDTHS


@pytest.mark.slow
@pytest.mark.parametrize("scan", [[], ["--scan"]], ids=["list", "scan"])
def test_heads_and_channels_are_removed_while_it_trains(run, folder, scan):
    channels = "--granularity channels --compact --switch-delay 1 --switch-steps 0 --saving 0"
    wide = json.dumps({"width": 64, "layers": [[4, 4, 64]] * 2})
    summary = run(
        *"--method agip --sparsity 0.5 --multiple 1 --widths".split(), wide, *channels.split(),
        *scan,
    )  # fmt: skip
    assert summary["switches"] and summary["parameters"] < 40_000
    width, layers = summary["widths"]["width"], summary["widths"]["layers"]
    assert width < 64 and all(heads == kv < 4 and mlp < 64 for heads, kv, mlp in layers)
    # What the summary says builds a network of this size.
    text = json.dumps(summary["widths"])
    words = [*WORDS, "--source-dir", str(folder), "--widths", text, *scan]
    made = experiment.Experiment(tyro.extras.overridable_config_cli(CONFIGS, args=words))
    variables = made.functions.variables["params"]
    sizes = [int(np.prod(np.shape(leaf))) for leaf in training_leaves(variables)]
    assert sum(sizes) == summary["parameters"]


def training_leaves(tree):
    return (
        [leaf for own in tree.values() for leaf in training_leaves(own)]
        if isinstance(tree, dict)
        else [tree]
    )


def test_evaluation_counts_every_byte_of_every_real_window():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5, 5)).astype(np.float32)
    mesh = experiment.sharding.make_mesh()
    evaluate = training.make_evaluate(lambda params, _, x: params[x], lambda x: x, mesh)
    tokens, labels = rng.integers(0, 5, (2, 8, 3))
    valid = np.array([True, True, False, True, False, False, False, False])
    state = training.TrainState(0, table, {}, ())
    found = evaluate(state, lambda: iter([(tokens, labels, valid)]), 8)
    logits = table[tokens][valid].reshape(-1, 5).astype(np.float64)
    right = labels[valid].ravel()
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(9), right]
    assert found["test_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["test_accuracy"] == pytest.approx((logits.argmax(1) == right).mean())


def test_held_out_text_is_evaluated_once_and_validation_is_not_trained_on(folder):
    words = [*WORDS, "--source-dir", str(folder), "--widths", json.dumps(WIDTHS)]
    config = tyro.extras.overridable_config_cli(CONFIGS, args=words)
    source = experiment.open_source(config, experiment.sharding.make_mesh())
    windows = [row for x, _, valid in source.test() for row in x[valid]]
    assert len({row.tobytes() for row in windows}) > 0.9 * len(windows)
    few = tyro.extras.overridable_config_cli(CONFIGS, args=[*words, "--validation", "11"])
    smaller = experiment.open_source(few, experiment.sharding.make_mesh())
    assert smaller.size == source.size - 11
    assert sum(valid.sum() for _, _, valid in smaller.test()) == 11
    with pytest.raises(ValueError, match="`validation` must be less than"):
        experiment.open_source(
            tyro.extras.overridable_config_cli(CONFIGS, args=[*words, "--validation", "99999"]),
            experiment.sharding.make_mesh(),
        )


def test_the_shapes_for_compiling_ahead_are_those_of_the_data(folder):
    words = [*WORDS, "--source-dir", str(folder)]
    config = tyro.extras.overridable_config_cli(CONFIGS, args=words)
    source = experiment.open_source(config, experiment.sharding.make_mesh())
    shapes = ahead.shapes_of(config)
    assert (shapes.shape, shapes.label, shapes.num_classes) == (source.shape, source.label, 256)
    assert (shapes.example.shape, shapes.example.dtype) == (source.example.shape, np.int32)
    images, labels = next(source.batches(0, 0))
    assert (images.dtype, labels.dtype) == source.dtypes == shapes.dtypes
    assert images.shape == labels.shape == (8, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("text_mini", "`source_dir` must name the folder with text files"),
        ("text_mini --source-dir absent", "`folder` must be a folder with text files"),
        ("text_mini --model resnet8", "`model` must be a decoder for the data set text"),
        ("digits_resnet8 --model decoder_mini", "`model` must be a decoder for the data set text"),
        ("text_mini --method synflow", "`method` synflow feeds images of ones"),
        ("text_mini --flip", "`pad`, `flip` and `small_images` are for images"),
        ("digits_resnet8 --scan", "`scan` needs a decoder; got resnet8"),
        ("text_mini --length 0", "`length` must be at least 1; got 0"),
        ('text_mini --source-dir . --widths {"width":8}', "`widths` must be JSON"),
    ],
)
def test_wrong_options(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train.main([*words.split(), "--workdir", str(tmp_path)])
    shown = f"{error.value} {capsys.readouterr().err}".replace("│", " ")
    assert message in " ".join(shown.split())


def test_commands_that_need_data_in_memory_refuse_text(tmp_path):
    with pytest.raises(ValueError, match="is a run on text, and this command needs a data set"):
        networks.read_dense(tmp_path, CONFIGS["text_mini"][1])


@pytest.mark.slow
def test_rewinding_prunes_the_layers_of_a_decoder_only(folder, tmp_path):
    options = "--length 16 --batch-size 8 --eval-batch-size 8 --steps 4 --warmup-steps 1"
    widths = ["--widths", json.dumps(WIDTHS), "--source-dir", str(folder)]
    command = ["text_mini", "--rounds", "1", "--rate", "0.5", "--methods", "fine_tune"]
    command += ["--workdir", str(tmp_path), "--", *options.split(), *widths]
    rewinding.main(command)
    _, masks = storage.load(tmp_path / "seed-0" / "networks" / "fine_tune-1.npz")
    kept = {path: float(np.mean(mask)) for path, mask in trees.leaf_by_path(masks).items()}
    assert all(share == 1 for path, share in kept.items() if "layers/" not in path)
    assert any(share < 0.6 for share in kept.values())


def test_sizes_of_the_study_have_as_many_parameters_as_zeros_leave(folder):
    """The small decoders of the study, and the masked ones that they are compared with."""

    def parameters(*more):
        words = ["text_mini", "--source-dir", str(folder), *more]
        config = tyro.extras.overridable_config_cli(CONFIGS, args=words)
        made = ahead.dense_network(config, ahead.shapes_of(config))
        params = made.variables["params"]
        layers = sum(int(np.prod(leaf.shape)) for leaf in training_leaves(params["layers"]))
        return layers, sum(int(np.prod(leaf.shape)) for leaf in training_leaves(params))

    layers, whole = parameters()
    for name, arm in study.arms().items():
        if name.startswith("small"):
            left = whole - layers * float(name.split()[1])
            assert parameters(*arm.options[2:])[1] == pytest.approx(left, rel=0.04)


@pytest.mark.slow
@pytest.mark.scripts
def test_the_study_of_text_gives_each_arm_the_same_time(folder, tmp_path):
    options = "--batch-size 8 --length 8 --eval-batch-size 8 --eval-every 99 --warmup-steps 1"
    seconds = {name: 1 + (name == "dense") for name in study.arms()}
    times = {"device": "cpu", "seconds": seconds, "rounds": 9}
    (tmp_path / "step_times.json").write_text(json.dumps(times))
    command = [str(folder), "--steps", "4", "--seeds", "0", "--workdir", str(tmp_path)]
    study.main([*command, "--arms", "dense", "small 0.9", "--", *options.split()])
    table = (tmp_path / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["dense", "small 0.9"]
    assert [line.split("|")[7].strip() for line in table[2:4]] == ["4", "8"]
    study.main(["--report-only", "--workdir", str(tmp_path)])
    assert (tmp_path / "results.md").read_text().splitlines() == table
    (tmp_path / "step_times.json").write_text(json.dumps(times | {"seconds": {"dense": "long"}}))
    with pytest.raises(SystemExit, match=r"step_times\.json.*dense.*must be a number"):
        study.main([*command, "--", *options.split()])
