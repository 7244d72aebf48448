"""Two processes train the same sub-networks, and the network that one process trains."""

import subprocess
import sys

import numpy as np
import pytest

from tests.support.children import PIPES, ends, free_port, kill

PROGRAM = """
import sys
from pathlib import Path
import jax, numpy as np
from jaxprune import elastic, processes
from tests.support import elastic as support

folder, address, count, me = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if count > 1:
    jax.distributed.initialize(address, count, me, heartbeat_timeout_seconds=10)
recipe = elastic.Recipe(batch_size=16, learning_rate=0.1, pad=1)
trained = elastic.train(
    support.make_space(), support.images(), steps=12, networks=2, recipe=recipe,
    workdir=folder / "run", save_every=4)
leaves = map(processes.on_host, jax.tree.leaves(trained.variables))
np.savez(folder / f"{me}.npz", *leaves, results=[own[3:] for own in trained.results])
"""


def run(folder, environment, count):
    """What each process has trained."""
    address = f"127.0.0.1:{free_port()}"
    words = [sys.executable, "-c", PROGRAM, str(folder), address, str(count)]
    children = [subprocess.Popen([*words, str(i)], env=environment, **PIPES) for i in range(count)]
    try:
        codes, outputs = ends(children)
    finally:
        kill(children)
    assert codes == [0] * count, outputs
    return [dict(np.load(folder / f"{i}.npz")) for i in range(count)]


@pytest.mark.processes
def test_two_processes_train_what_one_trains(environment, tmp_path):
    """Sums over devices differ in their order alone."""
    (tmp_path / "alone").mkdir()
    (alone,) = run(tmp_path / "alone", environment, 1)
    first, second = run(tmp_path, environment, 2)
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name])
        if name != "results":
            np.testing.assert_allclose(leaf, alone[name], rtol=0.02, atol=1e-3)
