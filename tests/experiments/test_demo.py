"""The demo's comparison shows what the runs measured, and a failed run is not passed over."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxprune import reports
from jaxprune.experiments import demo as demo_module


@pytest.fixture
def demo():
    return demo_module


def _write_run(folder, accuracy, nonzeros, sparse_bytes):
    """What scripts/train.py leaves of a finished run, as far as the demo reads it."""
    folder.mkdir(parents=True)
    summary = {
        "test_accuracy": accuracy,
        "parameters": 1000,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / 1000,
        "dense_bytes": 4000,
        "sparse_bytes": sparse_bytes,
        "state_bytes": 8000,
        "seconds": 12.34,
    }
    records = [{"step": 1, "test_accuracy": 0.1}, {"step": 9, "test_accuracy": accuracy}]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    reports.plot_densities(reports.summarize([np.eye(4)]), folder / "densities.png")


@pytest.mark.slow
def test_comparison_shows_what_was_measured(demo, tmp_path):
    _write_run(tmp_path / "dense", 0.96, 1000, 4000)
    _write_run(tmp_path / "agip", 0.95, 280, 1250)
    text = demo.compare(tmp_path)
    cells = {line[:26].strip(): line[26:].split() for line in text.splitlines()[2:10]}
    assert cells["Test accuracy"] == ["96.00%", "95.00%"]
    assert cells["Non-zero parameters"] == ["1,000", "280"]
    assert cells["Checkpoint, sparse (bytes)"] == ["4,000", "1,250"]
    assert cells["Whole run (seconds)"] == ["12.3", "12.3"]
    assert "28.0% of the parameters" in text and "99.0% of the dense accuracy" in text
    assert "3.2 times" in text
    for name in ("training.png", "densities.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in text


def test_failed_run_stops_the_demo(demo, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("import sys; sys.exit(3)")
    monkeypatch.setattr(demo, "TRAIN", [sys.executable, str(script)])
    monkeypatch.setattr(sys, "argv", ["demo.py", "--folder", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="the dense run ended with code 3"):
        demo.main()


def test_each_run_gets_its_options(demo, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("import sys; print(*sys.argv[1:], file=open(sys.argv[3] + '.txt', 'w'))")
    monkeypatch.setattr(demo, "TRAIN", [sys.executable, str(script)])
    monkeypatch.setattr(demo, "compare", lambda folder: "table")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--folder", str(tmp_path), "--steps", "7"])
    demo.main()
    common = "digits_resnet8 --workdir {} --method {} --steps 7"
    dense, agip = (tmp_path / f"{name}" for name in ("dense", "agip"))
    assert Path(f"{dense}.txt").read_text().strip() == common.format(dense, "none")
    assert Path(f"{agip}.txt").read_text().strip() == common.format(agip, "agip --sparsity 0.72")
