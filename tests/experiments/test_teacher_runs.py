"""scripts/train.py --teacher: the network before the first cut teaches the one after it."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import sharding, storage, trees
from jaxprune.experiments import stages, teacher, train
from jaxprune.experiments.config import Config

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS, CUT = 20, 10
# Masks change at 2 (nothing is pruned yet), 6 and 10; channels go at 10 and 14.
OPTIONS = f"""digits_resnet8 --granularity channels --compact --sparsity 0.5 --steps {STEPS}
    --batch-size 16 --prune-start 0.1 --prune-stop 0.5 --prune-every 4 --switch-delay 3
    --switch-steps 0.1 --saving 0.05 --parts 2 --multiple 1 --pad 1 --ema 0.5 --eval-every 20
    --eval-batch-size 360 --save-every 3 --log-every 1""".split()
WIDTHS = json.dumps({"stem": 8, "blocks": [[10, 8], [12, 14], [16, 18]]})
# Ends without a word at the checkpoint of a step, before or after it.
DYING = """
import os, sys
from jaxprune import checkpoints
from jaxprune.experiments import train
save, when, last = checkpoints.save, sys.argv.pop(1), int(sys.argv.pop(1))
def dies(manager, step, *rest):
    if (step, when) != (last, "before"):
        save(manager, step, *rest)
    if step == last:
        os._exit(9)
checkpoints.save = dies
train.main(sys.argv[1:])
"""


def run(workdir, environment, *more, die=(), code=0):
    own = ["-c", DYING, *die] if die else [str(SCRIPT)]
    words = [*own, *OPTIONS, "--widths", WIDTHS, "--workdir", str(workdir), *more]
    pipes = {"capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run([sys.executable, *words], env=environment, **pipes)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def records_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {own["step"]: own for own in lines if "train_loss" in own}


def leaves_of(workdir, step=STEPS):
    path = workdir / "checkpoints" / str(step) / "record" / "metadata"
    return json.loads(path.read_text())["leaves"]


@pytest.fixture(scope="module")
def finished(environment, tmp_path_factory):
    """A run with a teacher, and the same run without."""
    taught, alone = (tmp_path_factory.mktemp(name) for name in ("taught", "alone"))
    run(taught, environment, "--teacher", "0.5")
    run(alone, environment)
    return taught, alone


def test_nothing_differs_before_the_first_cut_and_the_teacher_counts_after_it(finished):
    taught, alone = map(records_of, finished)
    assert {step: taught[step]["train_loss"] == alone[step]["train_loss"] for step in taught} == {
        step: step <= CUT for step in taught
    }, "to the bit"
    assert not (finished[1] / teacher.NAME).exists()
    wide = alone[1]["macs"]
    for step, own in taught.items():
        more = wide / 3 if step > CUT else 0  # one pass of three
        assert own["macs"] == pytest.approx(alone[step]["macs"] + more)
        assert (own["peak_bytes"] > alone[step]["peak_bytes"]) == (step > CUT)
    first, second = (json.loads((path / "summary.json").read_text()) for path in finished)
    assert first["macs"] == second["macs"], "of the network itself, as are those of switches"
    assert [own["step"] for own in first["switches"]] == [CUT, 14]
    for ours, theirs in zip(first["switches"], second["switches"], strict=True):
        assert (ours["macs"], ours["macs_before"]) == (theirs["macs"], theirs["macs_before"])


def test_a_run_that_is_killed_goes_on_with_the_same_teacher(finished, environment, tmp_path):
    reference, file = finished[0], tmp_path / teacher.NAME
    same = [tmp_path, environment, "--teacher", "0.5"]
    run(*same, die=("before", str(CUT)), code=9)
    expected = file.read_bytes()
    file.write_bytes(b"of an attempt that no checkpoint knows")
    run(*same, die=("after", "12"), code=9)
    assert file.read_bytes() == expected
    file.unlink()
    printed = run(*same, code=1)
    assert f"error: teacher {file} is absent" in printed and "`--overwrite`" in printed
    assert "Traceback" not in printed
    file.write_bytes(expected)
    assert "resumes at step 12" in run(*same)
    assert leaves_of(tmp_path) == leaves_of(reference), "bit for bit"
    assert file.read_bytes() == expected == (reference / teacher.NAME).read_bytes()
    ours, theirs = records_of(tmp_path), records_of(reference)
    assert all(ours[step]["train_loss"] == theirs[step]["train_loss"] for step in ours)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4,fsdp=2"])
def test_it_learns_the_same_on_every_mesh(mesh, tmp_path, monkeypatch):
    """Eight devices; the masked averages of the state before the cut teach, split or not."""
    seen, before, advance = [], [], stages.Stages.advance

    def remember(path, like):
        seen.append(teacher.read_teacher(path, like))
        return seen[-1]

    def watched(own, state):
        before.append(jax.device_get(state))
        return advance(own, state)

    monkeypatch.setattr(stages, "read_teacher", remember)
    monkeypatch.setattr(stages.Stages, "advance", watched)
    options = [*OPTIONS, *"--steps 10 --prune-start 0.2 --prune-stop 0.2".split()]
    options += ["--learning-rate", "0.01"]
    losses = []
    for name, more in (("plain", []), ("split", ["--mesh", mesh])):
        workdir = tmp_path / name
        train.main([*options, "--teacher", "0.9", *more, "--workdir", str(workdir)])
        losses.append([own["train_loss"] for own in records_of(workdir).values()])
    np.testing.assert_allclose(*losses, rtol=1e-3)
    plain, split = seen
    for found, state in zip(seen, [own for own in before if own.step == 6], strict=True):
        (average,) = trees.state_fields(state.opt_state, "parameter_average")
        masks = jaxprune.get_masks(state.opt_state)
        expected = jax.tree.map(lambda leaf, mask: leaf * mask, average, masks)
        jax.tree.map(np.testing.assert_array_equal, found["params"], expected)
        jax.tree.map(np.testing.assert_array_equal, found["model_state"], state.model_state)
    specs = {tuple(leaf.sharding.spec) for leaf in jax.tree.leaves(split)}
    assert specs == {(), (None, None, None, "fsdp")}
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), plain, split)


LIKE = {
    "params": {"w": jax.ShapeDtypeStruct((3, 2), jnp.float32)},
    "model_state": {"n": jax.ShapeDtypeStruct((), jnp.int32)},
}


def placed():
    place = sharding.replicate(jnp.zeros(()), sharding.make_mesh()).sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), LIKE)


def variables():
    values = np.array([[1.5, -0.0], [0.0, np.nan], [3e-40, np.inf]], np.float32)
    return {"params": {"w": jnp.asarray(values)}, "model_state": {"n": jnp.int32(7)}}


def test_a_teacher_is_read_bit_for_bit_onto_all_devices(tmp_path):
    path, own = tmp_path / teacher.NAME, variables()
    teacher.write_teacher(path, jax.tree.map(jnp.zeros_like, own))
    teacher.write_teacher(path, own)
    found = teacher.read_teacher(path, placed())
    assert jax.tree.structure(found) == jax.tree.structure(own)
    for leaf, want in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(want).tobytes()
        assert len(leaf.sharding.device_set) == jax.device_count()
    assert [file.name for file in tmp_path.iterdir()] == [teacher.NAME], "nothing temporary"


def test_a_teacher_that_is_not_whole_is_named(tmp_path):
    path = tmp_path / teacher.NAME
    with pytest.raises(ValueError, match=rf"teacher {path} is absent, .*: put a copy of it back"):
        teacher.read_teacher(path, placed())
    teacher.write_teacher(path, variables())
    whole = path.read_bytes()
    damaged = [whole[:-9], whole[:40], b"", b"no archive"]
    at = whole.index(np.float32(np.inf).tobytes())  # the last kept weight
    damaged.append(whole[:at] + b"\1" + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"teacher {path} is corrupt .*`--overwrite`"):
            teacher.read_teacher(path, placed())
    storage.save(path, {"params": {"w": jnp.ones((3, 3))}}, overwrite=True)
    with pytest.raises(ValueError, match=r"(?s)w: float32\[3, 3\] in the file.*n: missing|missing"):
        teacher.read_teacher(path, placed())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compact": False}, "`teacher` 0.5 needs `granularity` channels and `compact`"),
        ({"granularity": "weights"}, "`teacher` 0.5 needs `granularity` channels and `compact`"),
        ({"teacher": 1.0}, r"`teacher` must be in \[0, 1\); got 1.0"),
        ({"teacher": -0.1}, r"`teacher` must be in \[0, 1\); got -0.1"),
        ({"teacher": float("nan")}, r"`teacher` must be in \[0, 1\); got nan"),
    ],
)
def test_what_does_not_go_with_a_teacher_is_refused(changes, message):
    options = {"granularity": "channels", "compact": True, "teacher": 0.5} | changes
    with pytest.raises(ValueError, match=message):
        Config(**options)
