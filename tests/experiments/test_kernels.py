"""`scripts/train.py --kernels auto`: the same training as without, resumed to the bit, and said."""

import functools
import json
import signal

import jax
import pytest

from jaxprune import sharding
from jaxprune.experiments import experiment, train
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.kernels import _table
from tests.support.sparse import always

STEPS = 24
OPTIONS = {
    "steps": STEPS,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": STEPS,
    "eval_batch_size": 360,
    "save_every": 10,
    "prune_every": 5,
    "prune_start": 0.0,
    "prune_stop": 0.5,
    "sparsity": 0.8,
    "method": "magnitude",
    "budget": "uniform",
}


@pytest.fixture(autouse=True)
def table(tmp_path_factory, monkeypatch):
    """A table by which every kernel pays, as that of this machine."""
    monkeypatch.setattr(_table, "user_cache", lambda: tmp_path_factory.getbasetemp())
    _table.saved_table(clock=always)


@pytest.fixture
def one_device(monkeypatch):
    """The first of the eight devices of the tests."""
    first = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(experiment.sharding, "make_mesh", first)


def run(workdir, **options):
    config = CONFIGS["digits_resnet8"][1]
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return train.train(Config(**fields | OPTIONS | {"workdir": str(workdir)} | options))


def leaves(workdir):
    path = workdir / "checkpoints" / str(STEPS) / "record" / "metadata"
    record = json.loads(path.read_text())
    return record["leaves"], record["record"]["sparse"]


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["train_loss"] for line in lines if "train_loss" in line]


@pytest.mark.slow
def test_a_run_with_kernels(one_device, tmp_path, capsys, monkeypatch):
    whole = run(tmp_path / "whole", kernels="auto")
    printed = capsys.readouterr().out
    assert "step 0: 0 of" not in printed and "masked leaves have sparse kernels" in printed
    kernels = whole["kernels"]["layers"]
    kinds = {layer["kernel"] for layer in kernels.values()}
    assert kinds == {"3x3 convolution", "product"}
    assert all(layer["expected"] == 2.0 for layer in kernels.values())

    # A training without kernels has the same losses, to rounding.
    dense = run(tmp_path / "dense")
    assert "kernels" not in dense and dense["sparsity"] == whole["sparsity"]
    pairs = zip(losses(tmp_path / "whole"), losses(tmp_path / "dense"), strict=True)
    assert all(a == pytest.approx(b, rel=2e-2) for a, b in pairs)

    # A run that is stopped between two mask updates ends with the same bits.
    log = train.Run.log

    def stopping(self, step, state, values):
        log(self, step, state, values)
        if step == 13:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Run, "log", stopping)
        run(tmp_path / "stopped", kernels="auto")
    capsys.readouterr()
    again = run(tmp_path / "stopped", kernels="auto")
    assert "resumes at step 13" in capsys.readouterr().out
    assert leaves(tmp_path / "stopped") == leaves(tmp_path / "whole")
    assert again["kernels"] == whole["kernels"]


@pytest.mark.slow
def test_images_that_grow(one_device, tmp_path, capsys, monkeypatch):
    """Layers are chosen again when images grow; a stop before or after that changes no bit."""
    grows = {"small_images": 0.5, "small_until": 0.6, "switch_delay": 2}
    run(tmp_path / "whole", kernels="auto", **grows)
    printed = capsys.readouterr().out
    chosen = [line for line in printed.splitlines() if "masked leaves have sparse kernels" in line]
    assert [line.split(":")[0] for line in chosen][-1] == "step 17", chosen
    run(tmp_path / "dense", **grows)
    # Rounding grows from step to step, fast where a norm sees eight small images.
    pairs = enumerate(zip(losses(tmp_path / "whole"), losses(tmp_path / "dense"), strict=True))
    assert all(a == pytest.approx(b, rel=2e-3 if n < 10 else 0.1) for n, (a, b) in pairs)
    log = train.Run.log
    for last in (12, 20):
        folder = tmp_path / f"stopped-{last}"

        def stopping(self, step, state, values, last=last):
            log(self, step, state, values)
            if step == last:
                signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(train.Run, "log", stopping)
            run(folder, kernels="auto", **grows)
        run(folder, kernels="auto", **grows)
        assert leaves(folder) == leaves(tmp_path / "whole")


BAD = {
    "`kernels` auto needs `method` agip": {"method": "acdc"},
    "`kernels` auto needs `granularity` weights": {"granularity": "channels", "method": "agip"},
    "`kernels` auto needs `chunk` 0 or 1; got 5": {"chunk": 5},
    "`kernels` auto needs one process": {"processes": 2, "coordinator": "127.0.0.1:1"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_go_with_kernels_is_said(message):
    with pytest.raises(ValueError, match=message):
        Config(kernels="auto", **BAD[message])


def test_several_devices_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, kernels="auto")
    text = f"{stopped.value.code} {capsys.readouterr().err}"
    assert "`kernels` auto needs one device, but the mesh has 8" in text
