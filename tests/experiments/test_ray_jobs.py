"""scripts/ray_jobs.py, with stand-ins: studies on a local Ray end as those on processes do."""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

from jaxprune import checkpoints
from jaxprune.experiments.studies import methods as study
from jaxprune.experiments.studies import ray_jobs
from tests.experiments import test_headline, test_study

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (jaxprune[ray])"
)
ROOT = Path(__file__).parents[2]
GRID, STEPS = test_study.GRID, test_study.STEPS

# `python -c DRIVER train.py ...` is `python scripts/study.py ...` with another train.py.
DRIVER = """
import sys
from jaxprune import reports
from jaxprune.experiments.studies import headline, methods
reports.plot_accuracy = reports.plot_tradeoffs = lambda *_: None
methods.TRAIN = headline.TRAIN = [sys.executable, sys.argv.pop(1)]
methods.main()
"""

# A Ray that others use, as long as its input is open.
CLUSTER = """
import ray, sys
options = dict(include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
context = ray.init("local", num_cpus=2, logging_level="ERROR", **options)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""

# A run that never ends by itself, and takes its time to save.
SLOW = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
def save(*_):
    time.sleep(1)
    (folder / "saved").write_text("")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / "here").write_text(str(os.getpid()))
time.sleep(300)
"""


@pytest.fixture(scope="module")
def environment():
    """Of drivers: folders of Ray that go away, no Ray and no compiled programs of the user."""
    left_out = {"RAY_ADDRESS", "JAX_COMPILATION_CACHE_DIR"}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        own = {key: value for key, value in os.environ.items() if key not in left_out}
        own |= {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
        # Ray would write a password of the user into the home folder.
        yield own | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture(scope="module")
def address(environment):
    """Of a running Ray."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, **pipes) as cluster:
        found = cluster.stdout.readline().strip()
        assert found, "Ray did not start"
        yield found
        cluster.stdin.close()


@pytest.fixture
def start(tmp_path, environment):
    """`start(train, *args)` starts a study in `tmp_path`, with this text as its train.py."""
    drivers = []

    def begin(train, *args):
        path = tmp_path / f"train{len(drivers)}.py"
        path.write_text(train)
        command = [sys.executable, "-c", DRIVER, str(path), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        drivers.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.kill()
        driver.communicate()


@pytest.fixture
def go(start):
    """As `start`, and waits: exit code and output."""

    def run(train, *args):
        driver = start(train, *args)
        return driver.wait(timeout=300), driver.stdout.read()

    return run


def _study(folder, **faults):
    folder.mkdir(exist_ok=True)
    faults = {name.replace("_", "-"): fault for name, fault in faults.items()}
    (folder / "faults.json").write_text(json.dumps(faults))
    return [*GRID, "--workdir", folder.name, "--seeds", "0", "1", "--jobs", "2"]


def _calls(folder):
    """Run -> what its stand-in saw, in the order in which they began."""
    lines = (folder / "calls.jsonl").read_text().splitlines()
    return {call["run"]: call for call in map(json.loads, lines)}


def _children(folder, count):
    """Process ids of so many slow runs, or nothing."""
    found = [path.read_text() for path in folder.glob("*/here")]
    return len(found) == count and all(found) and [int(pid) for pid in found]


def _until(condition):
    limit = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


# ---- without Ray


def test_without_ray_the_extra_is_named(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "ray" else find(n))
    for first in ([], ["headline"]):
        with pytest.raises(SystemExit) as stopped:
            study.main([*first, "fashion", "--engine", "ray", "--workdir", str(tmp_path)])
        assert stopped.value.code == 2
        assert "pip install 'jaxprune[ray]'" in capsys.readouterr().err


def test_an_address_needs_the_engine(capsys):
    with pytest.raises(SystemExit):
        study.main(["fashion", "--ray-address", "auto"])
    assert "--ray-address needs --engine ray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("nodes", "at_once", "expected"),
    [
        ([{"CPU": 8.0}], 1, {"num_cpus": 8}),
        ([{"CPU": 8.0}], 3, {"num_cpus": 2}),
        ([{"CPU": 2.0}], 4, {"num_cpus": 0.5}),
        ([{"CPU": 8.0}, {"CPU": 4.0}], 1, {"num_cpus": 8}),  # no machine has all twelve
        ([{"CPU": 8.0}, {"CPU": 4.0}], 3, {"num_cpus": 4}),
        ([{"CPU": 16.0, "GPU": 4.0}], 4, {"num_cpus": 4, "num_gpus": 1}),
        ([{"CPU": 9.0}, {"CPU": 8.0, "TPU": 4.0}], 2, {"num_cpus": 4, "resources": {"TPU": 1}}),
    ],
)
def test_resources(monkeypatch, nodes, at_once, expected):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert ray_jobs.resources(nodes, at_once) == expected
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert ray_jobs.resources(nodes, at_once).keys() == {"num_cpus"}


def test_a_cluster_without_cores_is_refused():
    with pytest.raises(ValueError, match="no machine of the Ray cluster has a core"):
        ray_jobs.resources([{"memory": 1e9}], 1)


def test_a_task_has_the_variables_of_the_study_and_the_devices_of_ray(tmp_path, monkeypatch):
    before = dict(os.environ)
    show = "import json, os; print(json.dumps(dict(os.environ) | {'in': os.getcwd()}))"
    monkeypatch.chdir(ROOT)
    try:
        os.environ |= {"OMP_NUM_THREADS": "1", "JAX_A": "Ray", "CUDA_VISIBLE_DEVICES": "3"}
        options = {"slot": 0, "slots": 1, "cached": True, "directory": str(tmp_path)}
        command = [sys.executable, "-c", show]
        variables = {"JAX_A": "study"}
        assert ray_jobs.train(command, Path(), "run", variables=variables, **options) == 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    seen = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert "OMP_NUM_THREADS" not in seen
    assert (seen["JAX_A"], seen["CUDA_VISIBLE_DEVICES"]) == ("study", "3")
    assert seen["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compilation_cache")
    assert seen["in"] == str(tmp_path)


def test_a_stop_while_ray_starts(tmp_path, monkeypatch):
    def init(*_, **__):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    with checkpoints.stop_signals() as stopped:
        assert list(ray_jobs.run({"a": ["true"]}, tmp_path, 1, stopped)) == []
        assert stopped == [signal.SIGTERM]
    assert not (tmp_path / "a").exists()


@needs_ray
def test_machines_without_jaxprune_are_named(tmp_path):
    import ray

    for cause, kind, text in (
        (
            RuntimeError("The remote function failed to import on the worker. No module named 'x'"),
            ValueError,
            "cannot import jaxprune, so it runs nothing; install jaxprune",
        ),
        (ValueError("another process is training a"), ValueError, "another process is training a"),
    ):
        error = ray.exceptions.RayTaskError("train", "traceback", cause)

        def get(_, error=error):
            raise error

        stand_in = types.SimpleNamespace(get=get, exceptions=ray.exceptions)
        with pytest.raises(kind, match=text):
            ray_jobs.exit_code(stand_in, None, tmp_path)


# ---- with Ray


@needs_ray
def test_results_are_those_of_the_other_engine(tmp_path, go, address):
    one, other = tmp_path / "one", tmp_path / "other"
    use = ["--engine", "ray", "--ray-address", address]
    faults = {"agip_0.72_seed0": "fail", "none_seed1": "together", "agip_0.72_seed1": "together"}

    code, text = go(test_study.FAKE, *_study(one, **faults), *use, *STEPS)
    assert code == 1 and "1 runs failed" in text
    log = Path("one", "agip-0.72-seed0", "log.txt")
    assert f"agip-0.72-seed0 FAILED with code 3; see {log}" in text
    assert (tmp_path / log).read_text() == "training agip-0.72-seed0\n"
    first = _calls(one)
    assert len(first) == 10
    (one / "calls.jsonl").unlink()

    code, text = go(test_study.FAKE, *_study(one), *use, *STEPS)
    assert code == 0, text
    assert "9 of 10 runs are finished already" in text
    assert list(_calls(one)) == ["agip-0.72-seed0"]

    code, text = go(test_study.FAKE, *_study(other), *STEPS)
    assert code == 0, text
    assert (one / "results.jsonl").read_bytes() == (other / "results.jsonl").read_bytes()
    second = _calls(other)
    shares = [{tuple(call["threads"]) for call in calls.values()} for calls in (first, second)]
    assert shares[0] == shares[1]
    for call, name in zip((first, second), ("one", "other")):
        assert {c["cache"] for c in call.values()} == {f"{tmp_path}/{name}/compilation_cache"}
        assert {c["minimum"] for c in call.values()} == {"0"}


@needs_ray
def test_the_headline_study(tmp_path, go, address, monkeypatch):
    (tmp_path / "headline").mkdir()
    (tmp_path / "headline" / "faults.json").write_text("[]")
    arms = ["--arms", "narrow", "--seeds", "0", "--workdir", "headline"]
    use = ["--engine", "ray", "--ray-address", address]
    code, text = go(test_headline.FAKE, "headline", "fashion", *arms, *use, *test_headline.TRAINING)
    assert code == 0, text
    calls = _calls(tmp_path / "headline")
    assert list(calls) == ["agip-seed0", "narrow-seed0"]
    assert {call["cached"] for call in calls.values()} == {"false"}


@needs_ray
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_runs_save_and_the_same_command_goes_on(tmp_path, start, go, kind, address):
    folder = tmp_path / "study"
    # A Ray of its own, and one that goes on.
    own = kind == signal.SIGTERM
    command = [*_study(folder), "--engine", "ray"] + ([] if own else ["--ray-address", address])
    driver = start(SLOW, *command, *STEPS)
    _until(lambda: _children(folder, 2))
    driver.send_signal(kind)
    assert driver.wait(timeout=300) == 128 + kind
    assert {p.parent.name for p in folder.glob("*/saved")} == {"none-seed0", "agip-0.72-seed0"}
    text = driver.stdout.read()
    assert "stopped; run the same command to resume" in text
    assert "FAILED" not in text
    use = ["--engine", "ray", "--ray-address", address, "--jobs", "1"]
    code, text = go(test_study.FAKE, *_study(folder), *use, *STEPS)
    assert code == 0, text
    runs = ["agip-0.72", "random-0.72", "agip-0.95", "random-0.95"]
    assert list(_calls(folder)) == [f"{run}-seed{seed}" for seed in "01" for run in ["none", *runs]]
    assert len((folder / "results.jsonl").read_text().splitlines()) == 10


@needs_ray
def test_after_kill_9_the_same_command_goes_on(tmp_path, start, go, address):
    folder = tmp_path / "study"
    command = [*_study(folder), "--engine", "ray", "--ray-address", address]
    driver = start(SLOW, *command, *STEPS)
    _until(lambda: _children(folder, 2))
    driver.kill()
    children = _children(folder, 2)
    _until(lambda: not any(map(_lives, children)))  # Ray ends what nobody waits for
    code, text = go(test_study.FAKE, *command, *STEPS)
    assert code == 0, text
    assert len(_calls(folder)) == 10


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@needs_ray
def test_a_lost_worker_fails_its_run_alone(tmp_path, start, address):
    folder = tmp_path / "study"
    driver = start(SLOW, *_study(folder), "--engine", "ray", "--ray-address", address, *STEPS)
    _until(lambda: _children(folder, 2))
    lost, other = (path.parent for path in sorted(folder.glob("*/here")))
    status = Path("/proc", (lost / "here").read_text(), "status").read_text().splitlines()
    worker = next(int(line.split()[1]) for line in status if line.startswith("PPid:"))
    os.kill(worker, signal.SIGKILL)
    _until(lambda: "Ray lost this run" in (lost / "log.txt").read_text())
    _until(lambda: len(list(folder.glob("*/here"))) == 3)
    driver.terminate()
    assert driver.wait(timeout=300) == 128 + signal.SIGTERM
    assert f"{lost.name} FAILED with code -9; see study/{lost.name}/log.txt" in driver.stdout.read()
    assert (other / "saved").exists()


@needs_ray
def test_a_run_that_another_process_trains_is_left_alone(tmp_path, go, address):
    import fcntl

    command = _study(tmp_path / "study")
    (tmp_path / "study" / "none-seed0").mkdir()
    with (tmp_path / "study" / "none-seed0" / "log.txt").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        use = ["--engine", "ray", "--ray-address", address]
        code, text = go(test_study.FAKE, *command, *use, *STEPS)
    assert code == 1
    assert "error: another process is training study/none-seed0; wait or end it" in text
    assert "Traceback" not in text
