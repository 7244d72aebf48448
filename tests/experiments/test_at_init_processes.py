"""Pruning before training on two processes: the masks of one process, and the same on both."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.support.children import PIPES, ends, free_port, kill

METHODS = ("snip", "grasp", "synflow")
# The last block is large enough to be split by `fsdp`.
WIDTHS = json.dumps({"stem": 4, "blocks": [[6, 4], [8, 8], [24, 24]]})

# scripts/train.py with all methods after one start, up to the state at step 0. Each process writes
# its masks. The second one is made to rank differently, as another machine may.
PROGRAM = f"""
import sys
from pathlib import Path
import jax, numpy as np
from jaxprune import at_init, processes
from jaxprune.experiments import config as configs, train

folder, mesh, coordinator, count, process = Path(sys.argv[1]), *sys.argv[2:]
own = dict(coordinator=coordinator, processes=int(count), process=int(process))
processes.start(**own, timeout=10)
own["host_timeout"] = 10
if process == "1":
    honest = at_init.snip
    at_init.snip = lambda *args: jax.tree.map(lambda x: x[::-1], honest(*args))

class Done(Exception):
    pass

def keep(run, state):
    masks = jax.tree.leaves(train.jaxprune.get_masks(state.opt_state))
    np.savez(folder / f"{{run.config.method}}-{{process}}.npz", *map(processes.on_host, masks))
    raise Done

train.Run.masks = keep
for method in {METHODS}:
    try:
        train.train(configs.Config(
            method=method, sparsity=0.8, batch_size=16, eval_batch_size=360, init_images=32,
            widths={WIDTHS!r}, mesh=mesh, workdir=str(folder / method), **own))
    except Done:
        pass
"""


def run(folder, environment, mesh, count):
    """What each process has: method -> masks."""
    address = f"127.0.0.1:{free_port()}"
    words = [sys.executable, "-c", PROGRAM, str(folder), mesh, address if count > 1 else ""]
    children = [
        subprocess.Popen([*words, str(count), str(i)], env=environment, **PIPES)
        for i in range(count)
    ]
    try:
        codes, outputs = ends(children)
    finally:
        kill(children)
    assert codes == [0] * count, outputs
    return [
        {method: [*np.load(folder / f"{method}-{i}.npz").values()] for method in METHODS}
        for i in range(count)
    ]


@pytest.mark.processes
def test_two_processes_have_the_masks_of_one(environment, tmp_path):
    """Large parameters are split over both, small ones are on each."""
    (tmp_path / "alone").mkdir()
    (alone,) = run(tmp_path / "alone", environment, "", 1)
    first, second = run(tmp_path, environment, "data=1,fsdp=2", 2)
    for method, expected in alone.items():
        kernels = [mask for mask in expected if mask.ndim == 4]
        kept = sum(mask.sum() for mask in kernels) / sum(mask.size for mask in kernels)
        assert 0.1 < kept < 0.3, method
        for found in (first[method], second[method]):
            for mask, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(mask, wanted, err_msg=method)
