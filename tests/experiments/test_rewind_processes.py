"""scripts/rewind.py on two processes: stopped, resumed; it ends with the numbers of one."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import rewinding, storage
from jaxprune.experiments.studies import rewinding as study
from tests.support.children import PIPES, ends, free_port, kill, until

SCRIPT = Path(__file__).parents[2] / "scripts" / "rewind.py"
STEPS = 12
METHODS = ("rewind_learning_rate", "rewind_weights")
# Nothing is saved in a round but its end, and where a signal stops it.
COMMAND = f"""digits_resnet8 --methods {" ".join(METHODS)} --rounds 1 --rewind-to .25 --guard 1
    --save-every 50 --seeds 0""".split()
# The last block is large enough to be split by `fsdp`.
WIDTHS = json.dumps({"stem": 4, "blocks": [[6, 4], [8, 8], [24, 24]]})
TRAINING = f"--steps {STEPS} --batch-size 16 --eval-batch-size 360 --log-every 1".split()
TRAINING += ["--learning-rate", "0.01", "--widths", WIDTHS]


@pytest.fixture
def start(environment):
    """`start(workdir, count)`; what is left of the processes is killed in the end."""
    children = []

    def go(workdir, count):
        address = f"127.0.0.1:{free_port()}"
        words = [sys.executable, str(SCRIPT), *COMMAND, "--workdir", str(workdir), "--", *TRAINING]
        if count > 1:
            words += ["--mesh", "data=1,fsdp=2", "--coordinator", address, "--host-timeout", "10"]
            words += ["--processes", str(count), "--process"]
        for process in range(count):
            own = [*words, str(process)] if count > 1 else words
            children.append(subprocess.Popen(own, env=environment, **PIPES))
        return children[-count:]

    yield go
    kill(children)


def results(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


@pytest.mark.processes
def test_two_processes_end_with_the_numbers_of_one(start, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    codes, outputs = ends(start(alone, 1))
    assert codes == [0], outputs

    children = start(both, 2)
    until(children[0], "dense 0")
    until(children[0], "step")  # of the first round
    children[1].send_signal(signal.SIGTERM)
    codes, outputs = ends(children)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    (said,) = [line for line in outputs[0].splitlines() if line.startswith("stopped at step")]
    step = said.partition(";")[0].rpartition(" ")[2]
    assert [*both.glob(f"seed-0/rewind*/round-1*/checkpoints/{step}/state")], outputs
    assert "step" not in outputs[1] and "seed" not in outputs[1]
    assert not (both / "seed-0" / "rewind_weights.json").exists()

    codes, outputs = ends(start(both, 2))
    assert codes == [0, 0], outputs
    assert (both / "results.md").read_text() in outputs[0] and "seed" not in outputs[1]
    assert results(both) == results(alone)
    assert "device: 2 x" in (both / "results.md").read_text()
    names = sorted(path.name for path in (alone / "seed-0" / "networks").iterdir())
    assert names == ["dense-0.npz", *(f"{method}-1.npz" for method in METHODS)]
    for name in names:
        found, masks = storage.load(both / "seed-0" / "networks" / name)
        expected, wanted = storage.load(alone / "seed-0" / "networks" / name)
        jax.tree.map(np.testing.assert_array_equal, masks, wanted)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), found, expected)
    (command,) = json.loads((both / "config.json").read_text())["commands"]
    assert "--mesh data=1,fsdp=2" in command and "--process" not in command


# ---- what needs one process only


def test_seeds_at_once_are_not_for_several_processes(tmp_path):
    args = ["digits_resnet8", "--jobs", "2", "--workdir", str(tmp_path / "a"), "--"]
    args += "--coordinator 127.0.0.1:1 --processes 2 --process 1".split()
    with pytest.raises(SystemExit, match="`--jobs` must be 1 where several processes"):
        study.main(args)
    assert not (tmp_path / "a").exists()


def test_commands_are_recorded_without_addresses():
    words = "a --jobs 1 -- --host-timeout=9 --steps 5 --coordinator 10.0.0.1:1 --process 1".split()
    assert study.without_hosts(words) == "a --jobs 1 -- --steps 5".split()


@pytest.mark.slow
def test_what_is_stopped_inside_of_a_round_is_saved(tmp_path):
    schedule = rewinding.hold(optax.cosine_decay_schedule(0.1, 10), 10)
    tx = jaxprune.chain(optax.sgd(schedule, momentum=0.9), jaxprune.fixed_mask_transform())
    stops, trained, ends = [(0, 4), (1, 7)], [], {}

    def init(number):
        params = {"kernel": jax.random.normal(jax.random.key(number), (6, 8))}
        return {"params": params, "opt_state": tx.init(params)}

    def train(state, start, stop, number):
        for step in range(start, stop):
            if (number, step) in stops:
                stops.remove((number, step))
                raise rewinding.Stopped(state, step)
            trained.append((number, step))
            params, key = state["params"], jax.random.fold_in(jax.random.key(number), step)
            grads = {"kernel": params["kernel"] - jax.random.normal(key, (6, 8))}
            updates, opt_state = tx.update(grads, state["opt_state"], params)
            state = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
        return state

    def go(workdir):
        def keep(result, state):
            ends[workdir.name, result.number] = state

        task = rewinding.Task(init, train, lambda state: 0.0, schedule, 10, "toy")
        return rewinding.rewind_learning_rate(task, workdir, [0.5], on_round=keep)

    for _ in range(2):
        with pytest.raises(rewinding.Stopped, match="stopped at step"):
            go(tmp_path / "stopped")
    go(tmp_path / "stopped")
    assert trained == [(number, step) for number in (0, 1) for step in range(10)]
    go(tmp_path / "whole")
    for number in (0, 1):
        jax.tree.map(np.testing.assert_array_equal, ends["stopped", number], ends["whole", number])
    assert jnp.any(ends["whole", 1]["params"]["kernel"] == 0)
