"""benchmarks/fronts.py: reads what two studies left, trains what is missing, draws all of it."""

import json
import sys

import pytest

from tests.support.benchmarks import load

fronts = load("fronts")
SEARCHES = [
    {"search": "amc", "budget": 0.5, "macs": 0.5, "accuracies": {"fine_tune": 0.90}},
    {"search": "amc", "budget": 0.5, "macs": 0.48, "accuracies": {"fine_tune": 0.92}},
    {"search": "greedy", "budget": 0.5, "macs": 0.5, "accuracies": {"fine_tune": 0.5}},
]
ELASTIC = [
    {"kind": "cut", "budget": 0.4, "seed": 0, "macs": 40, "full_macs": 100,
     "accuracy_before": 0.8, "accuracy": 0.85},
    {"kind": "cut", "budget": 0.6, "seed": 0, "macs": 40, "full_macs": 100,
     "accuracy_before": 0.8, "accuracy": 0.85},
    {"kind": "short", "budget": 0.4, "seed": 0, "macs": 40, "full_macs": 100,
     "accuracy_before": None, "accuracy": 0.1},
]  # fmt: skip
# Leaves what train.py would leave.
FAKE = """
import json, pathlib, sys
words = sys.argv[1:]
value = lambda name: words[words.index(name) + 1]
folder = pathlib.Path(value("--workdir"))
folder.mkdir(parents=True)
sparsity = float(value("--sparsity"))
summary = {"macs": 100 * (1 - sparsity), "test_accuracy": 1 - sparsity / 10}
(folder / "summary.json").write_text(json.dumps(summary))
"""


def test_points_are_means_over_seeds():
    lines = fronts.lines_of(SEARCHES, ELASTIC, [])
    assert list(lines) == ["search: amc", "once-for-all, as cut", "once-for-all, fine-tuned"]
    (point,) = lines["search: amc"]
    assert point["cost"] == pytest.approx(0.49) and point["accuracy"] == pytest.approx(0.91)
    assert point["runs"] == 2 and point["SD"] == pytest.approx(0.02 / 2**0.5)
    assert [own["accuracy"] for own in lines["once-for-all, fine-tuned"]] == [0.85]


@pytest.mark.scripts
def test_the_command(tmp_path, monkeypatch, capsys):
    for name, records in (("searches", SEARCHES), ("elastic", ELASTIC)):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / name / "results.jsonl").write_text(lines)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(FAKE)
    monkeypatch.setattr(fronts, "ROOT", tmp_path)
    words = ["--searches", str(tmp_path / "searches"), "--elastic", str(tmp_path / "elastic")]
    words += ["--workdir", str(tmp_path / "out"), "--sparsities", "0.5", "--seeds", "0", "1"]
    fronts.main(words)
    assert capsys.readouterr().out.count("scripts/train.py") == 2
    assert (tmp_path / "out" / "fronts.png").read_bytes()[1:4] == b"PNG"
    assert "| AGIP while it trains | 2 | 50.0% | 95.00% | 0.00% |" in (
        tmp_path / "out" / "fronts.md"
    ).read_text().replace("  ", " ")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    fronts.main(words)  # what is there is not trained again
