"""scripts/compile_for_tpu.py: its command line, its checks, and a run."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxprune import programs, reports, training
from jaxprune.experiments.ahead import checks, steps
from jaxprune.experiments.ahead import compile as compile_for_tpu
from jaxprune.experiments.config import CONFIGS
from jaxprune.programs import Collective, _tpus
from jaxprune.transforms import AgipState
from tests.support.hlo import TPU_PROGRAM

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_for_tpu.py"


# ---- the command line


@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:2x4", "v5p:4x4x8", "v6e:16x16"])
def test_topologies(text):
    _tpus.check_topology(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "`topology` must have 2 sides for v5e; use for example v5e:2x4; got 'v5e'"),
        ("v5e:8", "`topology` must have 2 sides for v5e"),
        ("v4:2x4", "`topology` must have 3 sides for v4; use for example v4:2x2x1; got 'v4:2x4'"),
        ("v5p:2x2x0", "`topology` must have 3 sides for v5p"),
        ("v6e:2xtwo", "`topology` must have 2 sides for v6e"),
        ("h100:8", "`topology` must be a family of TPUs and the sides of a slice; use for example"),
        ("", "v4:2x2x1, v5e:2x4, v5p:2x2x1, v6e:2x4; got ''"),
    ],
)
def test_bad_topologies(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _tpus.check_topology(text)


def test_command_line():
    options = compile_for_tpu.parse("--topology v4:2x2x1 --mesh data=4 -- --sparsity 0.9".split())
    assert options.topology == ["v4:2x2x1"] and options.mesh == "data=4"
    assert options.training == ["--sparsity", "0.9"] and options.config == "synthetic_resnet50"
    families = [text.partition(":")[0] for text in compile_for_tpu.parse([]).topology]
    assert families == ["v4", "v5e", "v5p", "v6e"]
    assert compile_for_tpu.parse(["--platform", "cpu"]).topology == ["cpu"]
    with pytest.raises(SystemExit):
        compile_for_tpu.parse(["--config", "resnet50"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "model=8"], "no such axis; use data or fsdp"),
        (["--mesh", "data=3"], "data=3 needs 3, but there are 8; use for example data=8"),
        (["--", "--batch-size", "12"], "`batch_size` must divide by the number of devices (8)"),
        (["--", "--method", "grasp"], "`method` must be none of snip, grasp, synflow"),
        (["--", "--mesh", "data=4,fsdp=4"], "use for example data=2,fsdp=4"),
    ],
)
def test_errors_are_messages(options, message):
    """Before anything is compiled; the devices are those of the tests."""
    common = ["--platform", "cpu", "--config", "digits_resnet8"]
    with pytest.raises(SystemExit) as error:
        compile_for_tpu.main([*common, *options])
    assert str(error.value).startswith("error: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("installed", "fix"), [(None, "`make tpu-check` installs libtpu"), ("", "example v5e:2x4")]
)
def test_what_libtpu_refuses_names_the_fix(installed, fix, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no such layout")

    monkeypatch.setattr(_tpus.topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(_tpus.importlib.util, "find_spec", lambda _: installed)
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "")
    with pytest.raises(ValueError, match=f"v5e:3x3 cannot be compiled for: no such layout.*{fix}"):
        programs.tpu_devices("v5e:3x3")


# ---- checks


def test_a_gpu_needs_its_platform(capsys):
    with pytest.raises(SystemExit) as stopped:
        compile_for_tpu.main(["--topology", "h100:8"])
    assert "`topology` h100:8 is one of GPUs; add `--platform cuda`" in str(stopped.value)


def gather(size, source, conditional=False):
    return Collective("all-gather", 4 * size, (1, size), source, conditional)


@pytest.mark.parametrize(
    ("own", "passed", "found"),
    [
        ([], True, "0 entries at most"),
        ([gather(99, "jit(step)/optimizer/cond/sort", True)], True, "99 entries at most"),
        ([gather(100, "jit(step)/jvp()/dot_general")], True, "0 entries at most"),
        ([gather(100, "jit(step)/optimizer/mul")], False, "100 entries for 'jit(step)/optimizer"),
        ([gather(100, "jit(step)/cond/sort", True)], False, "1 all-gathers of 100 or more"),
        ([gather(100, "step/(jvp():optimizer)")], False, "100 entries for 'step/(jvp():opt"),
        ([gather(100, "")], False, "100 entries for ''"),
        ([gather(100, "")._replace(kind="all-reduce")], True, "0 entries at most"),
    ],
)
def test_gathers(own, passed, found):
    check = checks.check_gathers(own, 100)
    assert check.passed is passed and found in check.text


def test_gathers_of_a_program():
    """The program gathers a mask of 64 entries in the branch of the mask update."""
    own = programs.collectives(TPU_PROGRAM)
    assert checks.check_gathers(own, 65).passed
    assert "branch_1_fun/sort" in checks.check_gathers(own, 64).text


def f32(*shape):
    return programs.arguments(entry(f"f32[{','.join(map(str, shape))}]"))[0]


def pred(*shape):
    return programs.arguments(entry(f"pred[{','.join(map(str, shape))}]"))[0]


def entry(shape):
    return f"ENTRY %main (x: {shape}) -> f32[] {{\n  %x = {shape}{{}} parameter(0)\n}}"


def state_of(mask=None, statistic=None, counter=None):
    """A state of a kernel [8, 16] that is split in two; what is given is wrong on purpose."""
    pruning = AgipState(
        prune_step=counter or f32(),
        mask_updates=f32(),
        refused=f32(),
        timetable_mark=f32(),
        masks={"kernel": mask or pred(4, 16)},
        gradient_average={"kernel": statistic or f32(4, 16)},
        densities=(),
        mean_statistics=(),
    )
    params = {"kernel": f32(4, 16), "bias": f32(16)}
    return training.TrainState(f32(), params, {}, ((), ({"kernel": f32(4, 16)},), pruning))


def test_masks_and_statistics():
    assert checks.check_masks(state_of()) == (
        True, "masks take 64 bytes for 64 pruned weights; 1 for each at most"
    )  # fmt: skip
    check = checks.check_statistics(state_of())
    assert check.passed and "272 bytes for 64 pruned weights; 4 for each at most" in check.text
    assert checks.smallest_split({"kernel": f32(8, 16), "bias": f32(16)}, state_of()) == 128
    whole = {"kernel": f32(4, 16), "bias": f32(16)}
    assert checks.smallest_split(whole, state_of()) == 64


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (f32(4, 16), "kernel: f32[4, 16] for a parameter [4, 16]"),
        (pred(8, 16), "kernel: pred[8, 16] for a parameter [4, 16]"),
        (pred(8, 8), "masks must be bools, split like parameters"),
    ],
)
def test_wrong_masks(mask, found):
    check = checks.check_masks(state_of(mask=mask))
    assert not check.passed and found in check.text


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"statistic": f32(8, 16)}, "gradient_average/kernel: [8, 16] for one of [4, 16]"),
        ({"counter": f32(17)}, "statistics take 336 bytes for 64 pruned weights"),
    ],
)
def test_wrong_statistics(wrong, found):
    check = checks.check_statistics(state_of(**wrong))
    assert not check.passed and found in check.text


def program(flops=100.0, temporaries=10**9, aliased=None, state=None):
    state = state or state_of()
    nbytes = sum(leaf.padded for leaf in _leaves(state))
    memory = reports.Memory(nbytes, nbytes, temporaries, nbytes if aliased is None else aliased)
    return steps.Program(1.0, memory, flops, 0.0, state, [])


def _leaves(tree):
    return checks.jax.tree.leaves(tree)


def test_in_place():
    assert checks.check_in_place(program()).passed
    check = checks.check_in_place(program(aliased=512))
    assert not check.passed and "writes 512 bytes in place; its state has 916" in check.text


def test_smaller():
    dense, half = program(), program(flops=30.0, temporaries=4 * 10**8)
    found = checks.check_smaller([1000, 250], [dense, half])
    assert [check.passed for check in found] == [True, True]
    assert "0.300 of the FLOPs; MACs say 0.250, at most 0.312" in found[0].text
    assert "0.400 of the peak memory; MACs say 0.500, at most 0.633" in found[1].text
    found = checks.check_smaller([1000, 250], [dense, dense])
    assert not any(check.passed for check in found)
    # What the compiler takes for itself hides what a tiny network saves.
    tiny = program(temporaries=10**6)
    found = checks.check_smaller([1000, 250], [tiny, tiny])
    assert [check.passed for check in found] == [False, True]


def test_all_checks():
    networks = [
        SimpleNamespace(variables={"params": {"kernel": f32(8, 16), "bias": f32(16)}}, macs=macs)
        for macs in (1000, 999)
    ]
    found = [program(), program()]
    assert [check.passed for check in checks.check_all(networks, found)] == [True] * 6
    bad = found[0]._replace(collectives=[gather(128, "jit(step)/optimizer/sort")])
    assert [check.passed for check in checks.check_all(networks, [bad, bad])].count(False) == 1
    # A dense run has no masks to speak of.
    dense = state_of()._replace(opt_state=((), ()))
    found = [program(state=dense)] * 2
    assert len(checks.check_all(networks, found)) == 3


# ---- the real step


def run(environment, *options):
    pipes = {"capture_output": True, "text": True, "timeout": 900}
    return subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, **pipes)


def test_a_run_for_fake_devices(environment):
    """The whole script, with eight devices of this machine in the place of TPUs."""
    done = run(
        environment, "--platform", "cpu", "--config", "digits_resnet8", "--mesh", "data=4,fsdp=2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu: 8 x cpu, mesh data=4,fsdp=2" in done.stdout
    assert "resnet8, agip on weights, float32, 64 images of 8x8x1 a step" in done.stdout
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("  ok ")]) == 6
    numbers = {line[:34].strip(): line[34:].split() for line in lines if line[:1] == " "}
    assert float(numbers["million parameters"][0]) == pytest.approx(0.07775, rel=1e-3)
    assert int(numbers["all-reduce, mask update"][0]) > 0
    assert "all-gather, mask update" not in numbers


def test_shapes_are_those_of_the_data_sets():
    """The table of the script against the data."""
    from jaxprune import data

    config = CONFIGS["digits_resnet8"][1]
    digits, shapes = data.load("digits"), steps.shapes_of(config)
    assert digits.train.images.shape == (shapes.size, *shapes.shape)
    assert digits.num_classes == shapes.num_classes
    assert steps.shapes_of(dataclasses.replace(config, validation=37)).size == 1400
    synthetic = steps.shapes_of(CONFIGS["synthetic_resnet50"][1])
    assert (synthetic.size, *synthetic.shape) == (512, 224, 224, 3)
    imagenet = steps.shapes_of(CONFIGS["imagenet_resnet50"][1])
    assert imagenet[:3] == (1281167, (224, 224, 3), 1000)


def test_pruning_is_found_in_any_state():
    """An average of the parameters comes after it in the chain."""
    state = state_of()
    later = state._replace(opt_state=(state.opt_state, {"parameter_average": f32(4, 16)}))
    assert checks.pruning_of(later) is state.opt_state[-1]
    assert checks.pruning_of(state._replace(opt_state=((), ()))) is None


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler of TPUs, is not installed: `make tpu-check` has it",
)
def test_a_run_for_a_tpu():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = run(environment, "--topology", "v5e:2x4", "--config", "digits_resnet8")
    assert "v5e:2x4: 8 x TPU v5 lite, mesh data=8" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
