"""GPUs that this machine does not have: topologies, memory, and a program for one of them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxprune import programs
from jaxprune.experiments.ahead import checks
from jaxprune.experiments.ahead import compile as compile_for_tpu
from jaxprune.programs import _gpus as gpus
from jaxprune.programs import _tpus
from tests.experiments.test_compile_for_tpu import program
from tests.support.hlo import GPU_PROGRAM

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_for_tpu.py"


@pytest.mark.parametrize(
    ("text", "sides"),
    [("h100:8", (1, 8)), ("a100:1", (1, 1)), ("b200:2x8", (2, 8)), ("h100:16x4", (16, 4))],
)
def test_topologies(text, sides):
    gpu, *found = gpus.parse(text)
    assert gpu is gpus.GPUS[text[:4]] and tuple(found) == sides


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v100:8", "`topology` must be one of a100, h100, b200 and a number of GPUs; use for exam"),
        ("", "use for example h100:8; got ''"),
        ("h100", "`topology` must give the number of GPUs, or of machines and of GPUs in each"),
        ("b200:0", "use for example b200:8 or b200:2x8; got 'b200:0'"),
        ("h100:2x", "got 'h100:2x'"),
        ("h100:1x2x8", "got 'h100:1x2x8'"),
        ("h100:eight", "got 'h100:eight'"),
    ],
)
def test_bad_topologies(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gpus.gpu_devices(text)


def test_command_line():
    assert compile_for_tpu.parse(["--platform", "cuda"]).topology == ["h100:8"]
    options = compile_for_tpu.parse("--platform cuda --topology a100:4 b200:8".split())
    assert options.topology == ["a100:4", "b200:8"]
    with pytest.raises(ValueError, match="for GPUs use `gpu_devices`"):
        _tpus.check_topology("h100:8")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotImplementedError, "needs the CUDA plugin of JAX .nothing.; `make cuda-check` installs"),
        (RuntimeError, "h100:8 cannot be compiled for: nothing; use for example h100:8"),
    ],
)
def test_what_jax_refuses_names_the_fix(error, message, monkeypatch):
    def refuse(*_, **__):
        raise error("nothing")

    monkeypatch.setattr(gpus.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=message):
        gpus.gpu_devices("h100:8")


def test_what_jax_is_told(monkeypatch):
    told = {}

    def describe(name, **options):
        told.update(options)
        raise NotImplementedError

    monkeypatch.setattr(gpus.topologies, "get_topology_desc", describe)
    with pytest.raises(ValueError):
        gpus.gpu_devices("h100:2x8")
    assert told["platform"] == "cuda" and told["topology"] == "1x2x8"
    assert "core_count: 132" in told["target_config"]
    assert "cuda_compute_capability { major: 9 feature_ext" in told["target_config"]
    assert told["target_config"].endswith('device_description_str: "NVIDIA H100 80GB HBM3"')
    keys = [set(gpu.facts) for gpu in gpus.GPUS.values()]
    assert keys == [keys[0]] * 3 and not keys[0] & set(gpus.SHARED)


# ---- programs


def test_gathers_of_pruning_are_found():
    """The gather of the program joins two arrays, one of them for pruning."""
    assert not checks.check_gathers(programs.collectives(GPU_PROGRAM)[:1], 64).passed


def test_memory():
    assert gpus.gpu_memory("h100:8") == 0.75 * 84942979072
    found = program()
    assert checks.check_fits(found, found.memory.peak).passed
    check = checks.check_fits(found, found.memory.peak - 1)
    assert not check.passed and f"must fit into {found.memory.peak - 1}, what JAX" in check.text


# ---- the real step


@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's CUDA plugin is not installed: `make cuda-check` has it",
)
def test_a_run_for_a_gpu(environment):
    options = ["--platform", "cuda", "--config", "digits_resnet8", "--mesh", "data=4,fsdp=2"]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "h100:8: 8 x NVIDIA H100 80GB HBM3, mesh data=4,fsdp=2" in done.stdout
    assert len(re.findall("^  ok ", done.stdout, re.M)) == 7
    assert "all-reduce, mask update" in done.stdout
    assert "all-gather, mask update" not in done.stdout
