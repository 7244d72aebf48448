"""What two processes agree on: only the first one's files, errors and numbers count."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxprune import processes

PROGRAM = """
import json, sys, time
from pathlib import Path
import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxprune import processes, sharding

folder, address, me = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, me, heartbeat_timeout_seconds=10)
calls, found = [], {}

def write():
    calls.append(me)
    time.sleep(0.5)
    (folder / "late").write_text("there")
    return {"who": me, "long": "x" * 5000}

found["value"] = processes.on_first(write)
found["seen"] = (folder / "late").exists()
found["calls"] = calls
found["nothing"] = processes.on_first(lambda: None)

def fail():
    raise KeyError(f"of {me}")

for name, call in ("raised", fail), ("no JSON", object):
    try:
        processes.on_first(call)
    except Exception as error:
        found[name] = [type(error).__name__, str(error)]
found["mine"] = processes.from_first({"a": np.arange(3) + me, "b": np.array([me == 0])})
found["mine"] = {name: leaf.tolist() for name, leaf in found["mine"].items()}
mesh = sharding.make_mesh({"fsdp": 2})
split = sharding.put(np.arange(4), sharding.NamedSharding(mesh, PartitionSpec("fsdp")))
found["split"] = processes.on_host(split).tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def both(environment, tmp_path_factory):
    """What two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("both")), address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([*words, i], env=environment, **pipes) for i in "01"]
    try:
        outputs = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.processes
def test_the_first_one_is_asked_and_all_know(both):
    for found in both:
        assert found["value"] == {"who": 0, "long": "x" * 5000}
        assert found["nothing"] is None
        assert found["seen"]  # nobody goes on before it is written
    assert [found["calls"] for found in both] == [[0], []]


@pytest.mark.processes
def test_an_error_is_one_of_all(both):
    assert [found["raised"] for found in both] == [["KeyError", "'of 0'"], ["ValueError", "'of 0'"]]
    assert [found["no JSON"][0] for found in both] == ["TypeError", "ValueError"]


@pytest.mark.processes
def test_arrays_of_the_first_one_and_of_all(both):
    for found in both:
        assert found["mine"] == {"a": [0, 1, 2], "b": [True]}
        assert found["split"] == [0, 1, 2, 3]


def test_one_process_alone():
    marker = object()
    assert processes.on_first(lambda: marker) is marker
    tree = {"a": np.ones(2)}
    assert processes.from_first(tree) is tree


def test_differences():
    found = [{"a": 1, "b": [2]}, {"a": 1, "b": [3]}, {"b": [2]}]
    assert processes.differences(found) == [
        "  a: 1 on process 0, 1; null on process 2",
        "  b: [2] on process 0, 2; [3] on process 1",
    ]
    assert processes.differences([{"a": 1}] * 3) == []


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "16"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1v-0,t1v-1"}, True),
        ({"TPU_ML_PLATFORM": "JAX"}, True),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_WORKER_HOSTNAMES": "t1v-0"}, False),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, False),
    ],
)
def test_clusters_are_recognised(environment, expected):
    assert processes.is_cluster(environment) is expected
