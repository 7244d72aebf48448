"""MobileNets for browsers: the configuration, the study, the saved networks and the demo."""

import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import browser, models, presets, reports
from jaxprune.experiments import browser_demo, network, pruning, sources, train, trained_networks
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.experiments.studies import phone

TINY = models.default_widths("mobilenet_v1", 0.1)


# ---- the configuration


def test_widths_of_the_configuration_are_half_of_the_published_ones():
    _, config = CONFIGS["fashion_mobilenet"]
    assert network.read_widths(config.widths) == models.Widths(
        **json.loads(json.dumps(models.default_widths("mobilenet_v1", 0.5)._asdict()))
    )
    assert pruning.prunable_of(config) is presets.pointwise


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padding": "SYMMETRIC"}, "`padding` SYMMETRIC needs a mobilenet; got `model` 'resnet8'"),
        ({"enlarge": -1}, "`enlarge` must be at least 0; got -1"),
        ({"enlarge": 32, "dataset": "synthetic"}, "`enlarge` is for digits and fashion_mnist"),
        (
            {"prunable": "pointwise", "granularity": "channels"},
            "`prunable` pointwise needs `granularity` weights",
        ),
        ({"prunable": "conv"}, "`prunable` must be one of default, pointwise"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Config(**options)


def test_enlarged_images_are_bilinear_and_have_three_channels():
    images = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
    large = np.asarray(sources.enlarged(jnp.asarray(images), 8))
    assert large.shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(large[..., 0], large[..., 2])
    # Centres of pixels: the second of eight lies a quarter of the way from the first to the second.
    row = images[0, 0, :, 0]
    wanted = [0.75 * row[0] + 0.25 * row[1], 0.25 * row[0] + 0.75 * row[1]]
    np.testing.assert_allclose(large[0, 0, 1:3, 0], wanted, atol=1e-6)
    with pytest.raises(ValueError, match="images of 1 or 3 channels; got 2"):
        sources.enlarged(jnp.zeros((1, 4, 4, 2)), 8)


# ---- the study


def write_run(root, arm, seed, accuracy, nonzeros):
    folder = root / f"{arm.replace(' ', '-')}-seed{seed}"
    folder.mkdir(parents=True)
    summary = {
        "test_accuracy": accuracy, "parameters": 1000, "nonzeros": nonzeros, "macs": 5e6,
        "cpu_seconds": 10.0, "steps": 7, "device": "1 x abacus",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def table_of(root):
    lines = [line for line in (root / "results.md").read_text().splitlines() if "|" in line]
    heading, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: dict(zip(heading, row, strict=True)) for row in rows}


def test_arms_are_controls_of_equal_steps():
    arms = phone.arms()
    assert [*arms] == [
        "dense", "agip 0.8", "agip 0.9", "narrow 0.35", "narrow 0.25", "narrow 0.15",
        "magnitude 0.8", "magnitude 0.9",
    ]  # fmt: skip
    assert not any("--steps" in arm.options for arm in arms.values())
    widths = json.loads(arms["narrow 0.25"].options[-1])
    assert models.Widths(**widths).blocks[-1] == [256]


def test_results_set_accuracy_beside_latency(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reports, "plot_tradeoffs", lambda *own, **more: drawn.append((own, more)))
    for seed in (0, 1):
        write_run(tmp_path, "dense", seed, 0.8, 1000)
        write_run(tmp_path, "narrow 0.25", seed, 0.7 + 0.02 * seed, 300)
        write_run(tmp_path, "agip 0.9", seed, 0.78, 100)
    phone.main(["--report-only", "--workdir", str(tmp_path)])
    rows = table_of(tmp_path)
    assert [*rows] == ["dense", "agip 0.9", "narrow 0.25"]  # the order of the arms
    assert rows["dense"]["speed-up"] == rows["dense"]["ms"] == "" and not drawn
    times = {f"dense-seed{seed}": [4.0, 2.0 + 2 * seed] for seed in (0, 1)}
    times |= {f"agip-0.9-seed{seed}": [1.0, 1.5] for seed in (0, 1)}
    times |= {f"narrow-0.25-seed{seed}": [2.0] for seed in (0, 1)}
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "latency.json").write_text(json.dumps({"browser": times}))
    phone.main(["--report-only", "--workdir", str(tmp_path)])
    rows = table_of(tmp_path)
    assert rows["agip 0.9"]["ms"] == "1.000" and rows["agip 0.9"]["speed-up"] == "3.00"
    assert rows["narrow 0.25"]["accuracy"] == "71.00% ± 1.41"
    assert rows["narrow 0.25"]["speed-up"] == "1.50" and rows["dense"]["speed-up"] == "1.00"
    ((plotted, _),), options = drawn[0][:1], drawn[0][1]
    assert options["labels"]["latency"]
    assert [(row["arm"], row["latency"]) for row in plotted][1] == ("agip 0.9", 1 / 3)


def test_damaged_latencies_are_named(tmp_path):
    write_run(tmp_path, "dense", 0, 0.8, 1000)
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "latency.json").write_text('{"browser": {"dense-seed0": ["fast"]}}')
    with pytest.raises(SystemExit, match=r"latency\.json"):
        phone.main(["--report-only", "--workdir", str(tmp_path)])


@pytest.mark.parametrize("words", [["--seeds", "-1"], ["--", "--widths", "{}"], ["--arms", "x"]])
def test_wrong_words_are_refused(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        phone.main(["--workdir", str(tmp_path), *words])
    assert "error" in capsys.readouterr().err


# ---- trained networks


@pytest.mark.slow
def test_trained_network_is_saved_with_its_zeros(tmp_path):
    """On the digits: what is saved computes what was trained, without sums of shifted images."""
    config = Config(
        dataset="digits", enlarge=16, model="mobilenet_v1", padding="SYMMETRIC",
        widths=json.dumps(TINY._asdict()), prunable="pointwise", method="agip", sparsity=0.8,
        steps=10, batch_size=16, prune_every=1, eval_every=10, eval_batch_size=360,
        workdir=str(tmp_path / "run"),
    )  # fmt: skip
    summary = train.train(config)
    folder = tmp_path / "networks"
    assert trained_networks.save_runs(folder, {"agip": (tmp_path / "run", "AGIP")}) == ["agip"]
    model, variables, facts = browser.load(folder, "agip")
    assert facts == {"title": "AGIP", "accuracy": summary["test_accuracy"]}
    assert model.padding == "SYMMETRIC" and not model.shifted
    kernels = [variables["params"]["blocks"][i]["project"]["conv"]["kernel"] for i in range(13)]
    zeros = sum(int((kernel == 0).sum()) for kernel in kernels)
    assert zeros == round(0.8 * sum(kernel.size for kernel in kernels))
    with np.load(folder / "images.npz") as found:
        assert found["inputs"].shape == (20, 16, 16, 3) and found["pixels"].shape == (20, 8, 8, 1)
        assert found["labels"].tolist() == [*range(10)] * 2
    # A second call keeps what is there.
    before = (folder / "agip.npz").stat().st_mtime_ns
    trained_networks.save_runs(folder, {"agip": (tmp_path / "run", "AGIP")})
    assert (folder / "agip.npz").stat().st_mtime_ns == before


def test_runs_that_are_not_finished_are_all_named(tmp_path):
    runs = {name: (tmp_path / name, name) for name in ("a", "b")}
    with pytest.raises(ValueError, match="(?s)must be finished.*a: holds.*b: holds"):
        trained_networks.save_runs(tmp_path / "networks", runs)


# ---- the demo


def test_demo_trains_saves_converts_and_checks(tmp_path, monkeypatch, capsys):
    script = tmp_path / "fake.py"
    script.write_text(
        f"import sys; print(*sys.argv[1:], file=open({str(tmp_path / 'calls')!r}, 'a'))"
    )
    fake = [sys.executable, str(script)]
    monkeypatch.setattr(browser_demo, "TRAIN", fake)
    monkeypatch.setattr(browser_demo, "save_runs", lambda folder, runs: [*runs])
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    modules = tmp_path / "node_modules"
    (modules / "@litertjs/core/wasm").mkdir(parents=True)
    (tmp_path / "demo/networks").mkdir(parents=True)
    (tmp_path / "demo/networks/networks.json").write_text("{}")

    def visit(server, query, **options):
        assert server.url.startswith("http://127.0.0.1:") and query == "rounds=200"
        return {"networks": [{"name": n, "ms": [m, 2 * m], "error": 1e-7}
                             for n, m in (("dense", 3.0), ("agip-90", 1.0))]}  # fmt: skip

    monkeypatch.setattr(browser, "visit", visit)
    words = ["--folder", tmp_path / "demo", "--modules", modules, "--python", python, "--check"]
    browser_demo.main([*map(str, words), "--steps", "3"])
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls[:3]] == [
        ["--method", own] for own in ("none", "agip", "agip")
    ]
    assert all(call.endswith("--steps 3") for call in calls[:3])
    assert calls[3].startswith("-m jaxprune.browser ") and "dense agip-80 agip-90" in calls[3]
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].split() == ["dense", "3.000", "3.750", "1.00x", "1.0e-07"]
    assert rows[1].split() == ["agip-90", "1.000", "1.250", "3.00x", "1.0e-07"]


def test_failed_training_stops_the_demo(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text("import sys; sys.exit(3)")
    monkeypatch.setattr(browser_demo, "TRAIN", [sys.executable, str(script)])
    with pytest.raises(SystemExit, match="the run dense ended with code 3"):
        browser_demo.main(["--folder", str(tmp_path)])


def test_fields_of_the_configuration_are_data():
    """`train.py` takes every option as a word."""
    _, config = CONFIGS["fashion_mobilenet"]
    assert Config(**dataclasses.asdict(config)) == config
    assert Path(phone.TRAIN[0]).name.startswith("python")
