"""Table of scripts/rewind.py on records made by hand."""

import json

import pytest

from jaxprune import files
from jaxprune.experiments.studies import rewinding_results

METHODS = ["rewind_weights", "fine_tune", "retrain_dense"]
# Accuracy of each round by method and seed; round 0 is the dense network.
DENSE = {0: 0.80, 1: 0.70}
SCORES = {
    ("rewind_weights", 0): [0.82, 0.80],
    ("rewind_weights", 1): [0.71, 0.69],
    ("fine_tune", 0): [0.79, 0.85],
    ("retrain_dense", 0): [0.83, 0.84],
    ("retrain_dense", 1): [0.75, 0.76],
}


def one(method, number, density, score, total):
    facts = {"steps": 60, "checkpoint_bytes": 9, "note": "", "score": score}
    return {"method": method, "number": number, "density": density, "total_steps": total} | facts


@pytest.fixture
def workdir(tmp_path):
    for (method, seed), scores in SCORES.items():
        kept = 1.0 if method == "retrain_dense" else 0.5
        rounds = [one("dense", 0, 1.0, DENSE[seed], 60)]
        for number, score in enumerate(scores, start=1):
            rounds.append(one(method, number, kept**number, score, 60 * (number + 1)))
        if method == "fine_tune":
            rounds[-1]["note"] = "lost something"
        record = {"seed": seed, "epoch": 30, "device": f"abacus {seed}", "rounds": rounds}
        folder = tmp_path / f"seed-{seed}"
        (folder / "dense" / "checkpoints" / "5").mkdir(parents=True, exist_ok=True)
        (folder / "dense" / "checkpoints" / "5" / "data").write_bytes(b"12345")
        (folder / f"{method}.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text(json.dumps({"commands": ["first", "second"]}))
    return tmp_path


def test_rows_are_means_over_seeds(workdir):
    rows = {(row["method"], row["density"]): row for row in _rows(workdir)}
    assert len(rows) == 1 + 2 + 2 + 1  # the dense control has two rounds of density 1
    dense = rows["none", 1.0]
    assert (dense["runs"], dense["accuracy"], dense["epochs"]) == (2, pytest.approx(0.75), 2.0)
    assert dense["SD"] == pytest.approx(0.1 / 2**0.5) and dense["to_dense"] == 0
    assert dense["to_retrained"] is None
    half = rows["rewind_weights", 0.5]
    assert half["to_dense"] == pytest.approx((0.02 + 0.01) / 2)
    # Against the dense network after as many rounds, seed by seed.
    assert half["to_retrained"] == pytest.approx((-0.01 - 0.04) / 2)
    assert half["epochs"] == 120 / 30
    alone = rows["fine_tune", 0.25]
    assert (alone["runs"], alone["SD"]) == (1, None)
    assert alone["to_dense"] == pytest.approx(0.05)


def _rows(workdir):
    return rewinding_results.write_results(workdir, METHODS)


def test_methods_come_in_the_given_order(workdir):
    names = dict.fromkeys(row["method"] for row in _rows(workdir))
    assert list(names) == ["none", *METHODS]


def test_the_largest_compression_without_loss(workdir):
    found = {
        row["method"]: row[rewinding_results.LOSSLESS]
        for row in rewinding_results.lossless(_rows(workdir))
    }
    # fine_tune loses in round 1 and gains in round 2; rewind_weights loses .005 in round 2.
    assert found == {"rewind_weights": "2.00", "fine_tune": "4.00"}


def test_the_page_has_everything(workdir):
    _rows(workdir)
    text = (workdir / "results.md").read_text()
    assert "| rewind_weights | 0.500 | 2.00 | 2 | 76.50% | 7.78% | +1.50% | -2.50% | 4.00 |" in text
    assert "| none | 1.000 | 1.00 | 2 | 75.00% | 7.07% | +0.00% |  | 2.00 |" in text
    for line in (
        "- command: `first`",
        "- command: `second`",
        "- device: abacus 1",
        "- seed 0: lost something",
        "- checkpoints on disk: 10 bytes",
    ):
        assert line in text
    runs = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert len(runs) == 2 + 2 * len(SCORES), "the dense networks count once"
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_from_another_dense_network_are_left_out(workdir):
    """The dense network of seed 0 was trained again; so far only fine_tune started from it."""
    dense = files.seal({"version": 2, **one("dense", 0, 1.0, 0.9, 60)})
    (workdir / "seed-0" / "dense" / "round.json").write_text(json.dumps(dense))
    path = workdir / "seed-0" / "fine_tune.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"rounds": [dense, *record["rounds"][1:]]}))
    rows = {(row["method"], row["density"]): row for row in _rows(workdir)}
    assert rows["none", 1.0]["accuracy"] == pytest.approx((0.9 + 0.7) / 2)
    assert rows["rewind_weights", 0.5]["runs"] == 1, "of seed 1 only"
    assert rows["fine_tune", 0.25]["to_dense"] == pytest.approx(0.85 - 0.9)
    text = (workdir / "results.md").read_text()
    for name in ("rewind_weights", "retrain_dense"):
        assert f"- left out, from another dense network: seed-0/{name}.json" in text
    assert "seed-0/fine_tune.json" not in text


def test_nothing_done_is_no_result(tmp_path):
    assert rewinding_results.write_results(tmp_path, METHODS) == []
    assert list(tmp_path.iterdir()) == []
