"""Several processes on one machine: the same run as one process, stopped, lost, and disagreeing."""

import contextlib
import http.server
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxprune import processes
from tests.support.children import PIPES, ends, free_port, kill, until

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS = 24
# Channels go after the mask updates at 2 and 8; the batch is large enough for rounding to be small.
OPTIONS = f"""digits_resnet8 --granularity channels --compact --sparsity 0.5 --steps {STEPS}
    --batch-size 32 --prune-start 0.09 --prune-stop 0.36 --prune-every 6 --switch-delay 3
    --switch-steps 0.1 --saving 0.05 --eval-every 12 --eval-batch-size 360 --save-every 6
    --log-every 2 --learning-rate 0.01 --host-timeout 10""".split()
WIDTHS = json.dumps({"stem": 4, "blocks": [[6, 4], [8, 8], [8, 10]]})


@pytest.fixture
def start(environment, tmp_path):
    """`start(workdir, *options of each process)`; what is left of it is killed in the end."""
    children = []

    def go(workdir, *each):
        port = free_port()
        for process, more in enumerate(each):
            words = [sys.executable, str(SCRIPT), *OPTIONS, "--widths", WIDTHS]
            words += ["--workdir", str(workdir), *more]
            if len(each) > 1:
                words += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(each))]
                words += ["--process", str(process)]
            children.append(subprocess.Popen(words, env=environment, **PIPES))
        return children[-len(each) :]

    yield go
    kill(children)


def leaves(workdir, step=STEPS):
    """Path -> array of a checkpoint."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step) / "state"
    with contextlib.closing(ocp.StandardCheckpointer()) as reader:
        metadata = reader.metadata(folder).item_metadata.tree
        tree = reader.restore(folder, target=_like(metadata))
    found = {"/".join(path): leaf for path, leaf in _flat(tree)}
    return {path: np.asarray(leaf) for path, leaf in found.items() if leaf is not None}


def _like(tree):
    import jax

    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)


def _flat(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in items:
        if isinstance(value, dict | list | tuple):
            yield from _flat(value, (*path, str(name)))
        else:
            yield (*path, str(name)), value


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def alone(environment, tmp_path_factory):
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    words = [sys.executable, str(SCRIPT), *OPTIONS, "--widths", WIDTHS, "--workdir", str(workdir)]
    pipes = {"capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run(words, env=environment, **pipes)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mesh", "signals"),
    [
        ("data=2", {}),
        ("data=1,fsdp=2", {10: signal.SIGKILL, 14: signal.SIGINT}),
    ],
)
def test_two_processes_train_as_one_does(alone, start, tmp_path, mesh, signals):
    """Through both switches; one of them is lost or stopped on the way, and all go on later."""
    for step, number in signals.items():
        children = start(tmp_path, *[["--mesh", mesh]] * 2)
        until(children[0], f"step {step}/")
        children[1].send_signal(number)
        codes, outputs = ends(children, timeout=120)
        if number == signal.SIGKILL:  # the other one notices
            assert codes[0] != 0 and codes[1] == -signal.SIGKILL
            assert outputs[0].count("error: ") == 1 and "stack trace" not in outputs[0]
        else:
            assert codes == [128 + signal.SIGTERM, 128 + number], outputs  # it is passed on so
            assert "stopped and saved at step" in outputs[0] and outputs[1].count("step") == 0
        assert not (tmp_path / "summary.json").exists()

    codes, outputs = ends(start(tmp_path, *[["--mesh", mesh]] * 2))
    assert codes == [0, 0], outputs
    assert ("resumes at step" in outputs[0]) == bool(signals)
    found, expected = summary_of(tmp_path), summary_of(alone)
    assert [entry["step"] for entry in found["switches"]] == [12]
    assert found["widths"] == expected["widths"] and found["parameters"] == expected["parameters"]
    assert found["device"].startswith("2 x")
    found, expected = leaves(tmp_path), leaves(alone)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        if leaf.dtype == bool:
            assert (found[path] == leaf).all(), path
        else:
            np.testing.assert_allclose(found[path], leaf, rtol=2e-3, atol=2e-4, err_msg=path)


@pytest.mark.processes
def test_processes_that_disagree_stop_at_once(start, tmp_path):
    codes, outputs = ends(start(tmp_path, ["--seed", "1"], ["--seed", "2"]))
    assert 0 not in codes
    for output in outputs:
        assert "processes of a run must agree" in output and "Traceback" not in output
        assert "seed: 1 on process 0; 2 on process 1" in output
    assert not (tmp_path / "config.json").exists()


# On a machine without a TPU, JAX forbids itself to ask who else there is.
OF_A_POD = """
import os
import jax
del os.environ["TPU_SKIP_MDS_QUERY"]
from jaxprune import processes
from jaxprune.experiments import command
with command.plain_errors():
    processes.start(timeout=10)
print(jax.process_index(), "of", jax.process_count())
"""


# Does nothing that another process could make fail, until one of them is killed.
IDLE = """
import os, signal, sys, time
from jaxprune import processes

sys.stderr.write("first\\n")
processes.start(sys.argv[1], 2, int(sys.argv[2]), timeout=10)
sys.stderr.write("second\\n")
if sys.argv[2] == sys.argv[3]:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


NOTICED = "W1129 22:16:52.538950   17734 preemption_sync_manager.cc:147] Failed to retrieve it"
DETECTED = "E1129 22:16:53 17734 client.h:77] the JAX distributed service detected fatal errors"


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        (["own", NOTICED, DETECTED, "*** a stack"], ["own", "error: lost"]),
        (["own", NOTICED, "more"], ["own", NOTICED, "more"]),  # not lost after all
        (["error: own", DETECTED], ["error: own", "error: lost"]),
        ([NOTICED, "error: own", DETECTED], ["error: own"]),
    ],
)
def test_what_is_shown_of_what_a_process_prints(printed, shown):
    words = [sys.executable, "-c", processes._FILTER, "error: lost\n"]
    text = "".join(line + "\n" for line in printed)
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == shown


@pytest.mark.processes
@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_host_dies_the_others_end_with_one_line(lost, environment):
    """JAX aborts them from a thread of C++, which prints its stack."""
    address = f"127.0.0.1:{free_port()}"
    words = [sys.executable, "-c", IDLE, address]
    children = [
        subprocess.Popen([*words, str(process), str(lost)], env=environment, **PIPES)
        for process in range(2)
    ]
    codes, outputs = ends(children, timeout=60)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] != 0
    assert outputs[1 - lost].splitlines() == [
        "first",
        "second",
        "error: a different process of this run ended: see what it printed. The newest checkpoint "
        "is complete; run the same command on all hosts to continue from there.",
    ]


class _Metadata(http.server.BaseHTTPRequestHandler):
    """What a host of a pod slice can ask: its number comes first in the path."""

    def do_GET(self):  # noqa: N802
        number, *_, name = self.path.strip("/").split("/")
        known = {"agent-worker-number": number, "tpu-env": "", "worker-network-endpoints": HOSTS}
        self.send_response(200 if name in known else 404)
        self.end_headers()
        self.wfile.write(known.get(name, "").encode())

    def log_message(self, *_):
        pass


HOSTS = "127.0.0.1,127.0.0.1"


@pytest.fixture
def pod(environment):
    """`pod(server of each host)`: what each prints about who it is."""

    def go(*servers):
        port = free_port()
        own = {"JAX_PLATFORMS": "cpu", "JAX_FORCE_TPU_INIT": "1", "JAX_COORDINATOR_PORT": str(port)}
        own = environment | own
        own = {name: value for name, value in own.items() if name != "TPU_SKIP_MDS_QUERY"}
        words = [sys.executable, "-W", "ignore", "-c", OF_A_POD]
        return ends(
            [subprocess.Popen(words, env=own | {"GCE_METADATA_IP": at}, **PIPES) for at in servers]
        )

    return go


@pytest.mark.processes
def test_hosts_of_a_pod_slice_find_each_other(pod):
    """With a stand-in for the server that describes a machine of Google's cloud."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        codes, outputs = pod(f"{address}/0", f"{address}/1")
        server.shutdown()
    assert codes == [0, 0], outputs
    assert [output.splitlines()[-1] for output in outputs] == ["0 of 2", "1 of 2"]


def test_a_pod_slice_without_its_server(pod):
    codes, outputs = pod(f"127.0.0.1:{free_port()}")
    assert codes == [1] and "Traceback" not in outputs[0]
    assert "error: JAX has not found the other processes" in outputs[0]
    assert "`coordinator`" in outputs[0] and "TPU_SKIP_MDS_QUERY=1" in outputs[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "data=3"], "`mesh` must use every device: data=3 needs 3, but there are 1"),
        (["--mesh", "model=1"], "no such axis; use data or fsdp"),
        (["--processes", "2"], "`processes` needs `coordinator`"),
        (["--process", "1"], "`process` must be less than `processes` (1); got 1"),
    ],
)
def test_bad_options(start, tmp_path, options, message):
    codes, outputs = ends(start(tmp_path, options))
    assert codes != [0] and message in " ".join(outputs[0].split())
    assert "Traceback" not in outputs[0]
