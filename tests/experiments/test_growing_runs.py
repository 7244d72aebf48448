"""scripts/train.py with a network that grows while it trains: the same run, interrupted or not."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import structure, training
from jaxprune.experiments import network, stages, train
from jaxprune.experiments.config import CONFIGS, Config
from jaxprune.experiments.experiment import Experiment

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS = 24
WIDTHS = {"stem": 8, "blocks": [[10, 8], [12, 14], [16, 18]], "head": None}
# Channels are to be added after step 8 and images to grow after 15, each with a switch 3 steps on.
OPTIONS = f"""digits_resnet8 --method none --granularity channels --grow-from 0.5 --grow-at 0.3
    --steps {STEPS} --batch-size 16 --switch-delay 3 --small-images 0.5 --small-until 0.6 --parts 2
    --multiple 1 --eval-every 12 --eval-batch-size 360 --save-every 4 --log-every 2""".split()
# Ends without a word after the checkpoint of a step.
DYING = """
import os, sys
from jaxprune import checkpoints
from jaxprune.experiments import train
save, last = checkpoints.save, int(sys.argv.pop(1))
def dies(manager, step, *rest):
    save(manager, step, *rest)
    if step == last:
        os._exit(9)
checkpoints.save = dies
train.main(sys.argv[1:])
"""


def run(workdir, environment, die=None, code=0):
    own = [str(SCRIPT)] if die is None else ["-c", DYING, str(die)]
    words = [*own, *OPTIONS, "--widths", json.dumps(WIDTHS), "--workdir", str(workdir)]
    pipes = {"capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, *words], env=environment, **pipes)
    assert done.returncode == code, done.stderr
    return done.stdout


def record(workdir, step=STEPS):
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(path.read_text())


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run(workdir, environment)


def test_the_network_gets_larger(finished):
    workdir, output = finished
    summary = summary_of(workdir)
    assert [own["step"] for own in summary["switches"]] == [11, 18], "channels, then images"
    grown, larger = summary["switches"]
    assert grown["difference"] < 1e-4 and "difference" not in larger
    assert grown["parameters_before"] < grown["parameters"] == summary["parameters"]
    assert summary["widths"] == WIDTHS and summary["sparsity"] == 0
    before, after = grown["parameters_before"], grown["parameters"]
    assert f"step 11: images of 4 x 4; grown from {before:,} to {after:,} parameters" in output
    assert output.count("grown from") == 1
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    at = {own["step"]: own for own in records if "train_loss" in own}
    assert [at[step]["parameters"] for step in (2, 10, 12, 24)] == [before, before, after, after]
    assert at[10]["macs"] < at[12]["macs"] == at[24]["macs"] == summary["macs"]
    # Micro-batches keep activations at those of the whole network in two parts on whole images.
    assert [at[step]["parts"] for step in (2, 12, 24)] == [1, 1, 2]
    assert [at[step]["image_height"] for step in (2, 12, 24)] == [4, 4, 8]


def test_interrupted_before_and_after_the_growth(finished, environment, tmp_path):
    """One run, killed twice: the same command goes on and ends with the same bits."""
    reference, _ = finished
    run(tmp_path, environment, die=8, code=9)  # channels are due, and nothing says so
    saved = record(tmp_path, 8)["record"]["stage"]
    assert saved["coming"] is None and saved["cut"] == 0 and saved["plan"] is not None
    printed = run(tmp_path, environment, die=11, code=9)
    assert "resumes at step 8" in printed and "step 11: " in printed
    saved = record(tmp_path, 11)["record"]["stage"]
    assert saved["cut"] is None and saved["plan"] is None and len(saved["history"]) == 1
    assert "resumes at step 11" in run(tmp_path, environment)
    assert record(tmp_path)["leaves"] == record(reference)["leaves"], "bit for bit"
    found, expected = summary_of(tmp_path), summary_of(reference)
    assert found["test_accuracy"] == expected["test_accuracy"]
    assert [own["step"] for own in found["switches"]] == [11, 18]


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(
        CONFIGS["digits_resnet8"][1], method="none", granularity="channels", grow_from=0.5,
        grow_at=0.3, steps=40, batch_size=16, multiple=4, ema=0.5, widths=json.dumps(WIDTHS),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "data=4,fsdp=2"])
def test_arrays_are_widened_and_lie_where_they_belong(config, mesh, monkeypatch):
    """Eight devices; momentum and averages of old channels stay, new ones start afresh."""
    made = Experiment(dataclasses.replace(config, mesh=mesh))
    own = stages.Stages(made)
    monkeypatch.setattr(
        own.shrinking, "_prepare", lambda stage: stages.Compiled(made.at(stage), peak_bytes=0)
    )
    state, plan = own.create(), own.stage.network.plan
    sizes = {name: group.size for name, group in own.stage.groups.items()}
    assert {group.full: sizes[name] for name, group in made.groups.items()} == {
        8: 4, 10: 8, 12: 8, 14: 8, 16: 8, 18: 12,
    }, "halves, rounded up to 4"  # fmt: skip

    def lies(state):
        like = own.like()
        assert jax.tree.structure(state) == jax.tree.structure(like)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
            assert x.shape == y.shape and x.sharding == y.sharding

    lies(state)
    whole = made.create(made.config.seed)
    small = plan.compact(jax.device_get(network.variables_of(whole)))
    jax.tree.map(np.testing.assert_array_equal, network.variables_of(state), small)
    own.begin(state)
    # As if it had trained: all that it holds is different from a fresh start.
    state = state._replace(step=state.step + 13)
    state = jax.tree.map(lambda x: x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    assert own.shrinking.next_step(0) == 13  # round(0.3 * 40) + 1
    assert own.advance(state) is state
    state = state._replace(step=state.step + 10)
    grown = own.advance(state)
    lies(grown)
    assert int(grown.step) == 23 and own.stage.cut is None
    for before, after, fresh in (
        (state.params, grown.params, None),
        (_mirror(state, "trace"), _mirror(grown, "trace"), 0.0),
        (_mirror(state, "parameter_average"), _mirror(grown, "parameter_average"), None),
    ):
        path = "params/blocks/0/conv1/kernel"
        before, after = (tree["blocks"][0]["conv1"]["kernel"] for tree in (before, after))
        old = np.ix_(*map(np.flatnonzero, plan.kept[path]))
        np.testing.assert_array_equal(np.asarray(after)[old], before)
        if fresh is not None:
            new = np.ones(after.shape, bool)
            new[old] = False
            assert new.any() and (np.asarray(after)[new] == fresh).all()
    assert own.shrinking.history[0]["difference"] < 1e-4


def _mirror(state: training.TrainState, name: str):
    """Returns the tree of a field somewhere in the optimizer state."""
    leaves = jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: hasattr(x, "_fields") and name in x._fields
    )
    return next(getattr(own, name) for own in leaves if hasattr(own, name))


def test_the_plan_to_begin_with_keeps_at_least_one_channel():
    w = {"in": jnp.ones((3, 20)), "mid": jnp.ones((20, 3)), "out": jnp.ones((3, 2))}
    groups = structure.find_groups(
        lambda w, x: jnp.tanh(jnp.tanh(x @ w["in"]) @ w["mid"]) @ w["out"], w, jnp.ones((1, 3))
    )
    options = {"method": "none", "granularity": "channels"}

    def shape(**more):
        return network.narrow_plan(groups, Config(**options, **more)).shape("mid")

    assert shape(grow_from=0.1) == (8, 1)  # widths of more than 8 are rounded up
    assert shape(grow_from=0.1, multiple=1) == (2, 1)
    assert shape(grow_from=0.4, multiple=5) == (10, 3)
    with pytest.raises(ValueError, match="`grow_from` 0.9 leaves nothing to add.*multiples of 20"):
        shape(grow_from=0.9, multiple=20)


def test_a_network_without_groups_cannot_grow():
    w = {"out": jnp.ones((3, 2))}
    groups = structure.find_groups(lambda w, x: x @ w["out"], w, jnp.ones((1, 3)))
    config = Config(method="none", granularity="channels", grow_from=0.5)
    with pytest.raises(ValueError, match="has 0 groups of channels"):
        network.narrow_plan(groups, config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "agip"}, "`grow_from` 0.5 needs `method` none, .*; got 'agip'"),
        ({"granularity": "weights"}, "needs `granularity` channels, .*; got 'weights'"),
        ({"compact": True}, "`compact` needs a method that prunes"),
        ({"kernels": "auto"}, "`kernels` auto needs `method`"),
        ({"grow_from": 0.0}, r"`grow_from` must be in \(0, 1\]; got 0.0"),
        ({"grow_at": 1.0}, r"`grow_at` must be in \[0, 1\); got 1.0"),
    ],
)
def test_what_does_not_go_with_growth_is_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.slow
def test_a_run_that_is_too_short_to_grow_is_refused(tmp_path):
    options = [*OPTIONS, "--steps", "8", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit, match="`growth.step` must be at least 1, and at most 2"):
        train.main(options)


def test_the_name_of_a_folder_says_that_it_grows(config):
    assert train.default_workdir(config) == "runs/digits-resnet8-grow-0.5-seed0"
    whole = dataclasses.replace(config, grow_from=1.0)
    assert train.default_workdir(whole) == "runs/digits-resnet8-none-seed0"
