"""scripts/export.py as a user runs it: its files, its table, and what it refuses."""

import json
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest

from jaxprune.experiments import export

TRAINING = (
    "digits_resnet8 --method agip --sparsity 0.9 --steps 20 --batch-size 16 "
    "--eval-batch-size 360 --log-every 20"
).split()


@pytest.fixture(scope="module")
def run(environment, tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    words = [sys.executable, "-m", "jaxprune.experiments.train", *TRAINING, "--workdir", folder]
    subprocess.run(list(map(str, words)), env=environment, check=True, capture_output=True)
    return folder


def refused(*args):
    with pytest.raises(SystemExit) as stop:
        export.main([str(arg) for arg in args])
    return str(stop.value.code)


def test_files_compute_what_the_run_does(run, capsys):
    pytest.importorskip("flatbuffers", reason="flatbuffers: `pip install 'jaxprune[export]'`")
    safetensors = pytest.importorskip("safetensors.numpy")
    export.main([str(run), "--to", "jax", "safetensors", "--check", "8"])
    shown = capsys.readouterr().out
    assert "1/2 jax" in shown and "2/2 safetensors" in shown
    assert shown.splitlines()[-3].split() == ["target", "bytes", "error", "sparse", "inference"]
    report = json.loads((run / "export" / "report.json").read_text())
    assert list(report) == ["jax", "safetensors"]
    assert report["jax"]["error"] <= 1e-5 and report["jax"]["inputs"] == ["float32[batch,8,8,1]"]

    trained = export.read_run(run, 3)
    content = bytearray((run / "export" / "network.jax").read_bytes())
    found = jax.export.deserialize(content).call(trained.examples)
    np.testing.assert_allclose(found, trained.apply(trained.variables, trained.examples), atol=1e-5)
    tensors = safetensors.load_file(run / "export" / "network.safetensors")
    kernels = [own for name, own in tensors.items() if own.ndim == 4]
    zeros = sum((own == 0).sum() for own in kernels) / sum(own.size for own in kernels)
    assert 0.85 < zeros < 0.95

    message = refused(run, "--to", "jax")
    assert "network.jax exists" in message and "--overwrite" in message


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    assert "holds no run of scripts/train.py" in refused(tmp_path, "--to", "safetensors")
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "is not finished" in refused(tmp_path, "--to", "safetensors")
    assert not (tmp_path / "export").exists()


def test_missing_targets_are_listed_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "NEEDS", dict.fromkeys(export.NEEDS, "no_such_package"))
    monkeypatch.setattr(export, "ROOT", tmp_path)
    message = refused(tmp_path, "--to", "litert", "onnx", "jax")
    assert "--to litert needs no_such_package" in message and "`make litert-check`" in message
    assert "`make onnx-check`" in message and "pip install 'jaxprune[export]'" in message


@pytest.mark.parametrize("words", [["--to", "torch"], [], ["--to", "jax", "--check", "0"]])
def test_unknown_words_are_refused(words, tmp_path):
    assert refused(tmp_path, *words) == "2"
