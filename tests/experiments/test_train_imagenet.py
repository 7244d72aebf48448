"""scripts/train.py on ImageNet, from tiny tars through the very same path: whole, stopped, bad."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxprune.data import imagenet_tars
from tests.data import test_imagenet as tiny
from tests.experiments import test_train_processes
from tests.support.children import PIPES, ends, free_port

STEPS = 8
OPTIONS = f"""imagenet_resnet50_agip --model resnet8 --dtype float32 --image-size 32 --steps {STEPS}
    --batch-size 8 --eval-batch-size 8 --eval-every 4 --save-every 2 --log-every 1 --workers 0
    --warmup-steps 2 --learning-rate 0.05 --prune-every 1""".split()
# train.py with the contents of the tiny tars in the place of those of ImageNet.
PROGRAM = """
import json, sys
from jaxprune.data import imagenet_tars
contents = imagenet_tars.Contents(*(tuple(x) for x in json.loads(sys.argv[1])), int(sys.argv[2]))
imagenet_tars.official = lambda: contents
from jaxprune.experiments import train
train.main(sys.argv[3:])
"""
WNIDS = tuple(tiny.CLASSES[i * 5 % len(tiny.CLASSES)] for i in range(tiny.VALIDATION))
COUNT = len(tiny.CLASSES) * tiny.PER_CLASS
originals = tiny.originals


@pytest.fixture(scope="module")
def source(originals, tmp_path_factory):
    return tiny.write_source(tmp_path_factory.mktemp("source"), *originals)


@pytest.fixture(scope="module")
def command(source, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")

    def make(workdir, *more, source=source):
        lists = json.dumps([tiny.CLASSES, WNIDS])
        words = [sys.executable, "-c", PROGRAM, lists, str(COUNT), *OPTIONS]
        words += ["--source-dir", str(source), "--data-dir", str(data)]
        return [*words, "--workdir", str(workdir), *more]

    return make


def run(words, environment):
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def whole(command, environment, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    done = run(command(workdir), environment)
    assert done.returncode == 0, done.stderr
    return workdir


def checkpoint(workdir):
    path = workdir / "checkpoints" / str(STEPS) / "record" / "metadata"
    return json.loads(path.read_text())["leaves"]


def test_a_run_from_tars_is_the_same_when_it_was_killed(whole, command, environment, tmp_path):
    summary = json.loads((whole / "summary.json").read_text())
    right = summary["test_accuracy"] * tiny.VALIDATION
    assert right == pytest.approx(round(right)), "each of the validation images counts once"
    assert summary["sparsity"] == pytest.approx(0.72, abs=1e-4)
    assert any("parameter_average" in path for path in checkpoint(whole))

    process = subprocess.Popen(command(tmp_path / "killed"), env=environment, **PIPES)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGKILL)
    process.communicate(timeout=400)
    assert not (tmp_path / "killed" / "summary.json").exists()
    done = run(command(tmp_path / "killed", "--threads", "1"), environment)
    assert "resumes at step 4" in done.stdout, done.stderr
    assert checkpoint(tmp_path / "killed") == checkpoint(whole), "bit for bit"


@pytest.mark.processes
def test_two_processes_read_their_parts_of_each_batch(whole, command, environment, tmp_path):
    """The run of one process: masks to the bit, and every image counts once in evaluation."""
    start = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    codes, outputs = ends(
        [
            subprocess.Popen(
                command(tmp_path / "two", *start, "--process", process), env=environment, **PIPES
            )
            for process in "01"
        ]
    )
    assert codes == [0, 0], outputs
    one, two = (test_train_processes.leaves(run, STEPS) for run in (whole, tmp_path / "two"))
    assert one.keys() == two.keys() and any("masks" in path for path in one)
    for path, leaf in one.items():
        if leaf.dtype == bool:
            assert (two[path] == leaf).all(), path
        else:
            np.testing.assert_allclose(two[path], leaf, rtol=2e-3, atol=2e-4, err_msg=path)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    right = summary["test_accuracy"] * tiny.VALIDATION
    assert right == pytest.approx(round(right))


def test_options_are_checked_before_anything_is_compiled(command, environment, tmp_path):
    done = run(command(tmp_path / "a", "--batch-size", str(COUNT + 1)), environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"`batch_size` must be in 1 .. the number of images ({COUNT})" in done.stderr


def test_bad_tars_are_one_message(command, environment, source, tmp_path):
    done = run(command(tmp_path / "a", source=tmp_path / "nowhere"), environment)
    assert done.returncode == 1 and imagenet_tars.TARS["train"] in done.stderr
    assert "Traceback" not in done.stderr
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    tar = broken / imagenet_tars.TARS["train"]
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    done = run(command(tmp_path / "b", source=broken), environment)
    assert done.returncode == 1 and str(tar) in done.stderr and "Traceback" not in done.stderr
