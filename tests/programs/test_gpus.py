"""scripts/gpus.py and `--platform cuda` of scripts/compile_for_tpu.py: GPUs that are not there."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxprune import programs
from jaxprune.experiments.ahead import checks
from jaxprune.experiments.ahead import compile as compile_for_tpu
from jaxprune.programs import _gpus as gpus
from jaxprune.programs import _tpus
from tests.experiments.test_compile_for_tpu import program

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_for_tpu.py"

# What XLA writes for a GPU, shortened: libraries' convolutions and products, and one of Triton.
PROGRAM = """HloModule jit_step, is_scheduled=true

%gemm_fusion_dot.1_computation (parameter_0: bf16[4,64,128], parameter_1: bf16[4,128,256]) -> f32[4,64,256] {
  %parameter_0 = bf16[4,64,128]{2,1,0} parameter(0)
  %parameter_1 = bf16[4,128,256]{2,1,0} parameter(1)
  ROOT %dot.1 = f32[4,64,256]{2,1,0} dot(%parameter_0, %parameter_1), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, rhs_contracting_dims={1}, backend_config={"sizes":["16"]}
}

ENTRY %main.0_spmd (images: bf16[2,8,8,16], kernel: bf16[32,3,3,16], a: bf16[64,128], b: bf16[128,256]) -> bf16[32,3,3,16] {
  %images = bf16[2,8,8,16]{3,2,1,0} parameter(0)
  %kernel = bf16[32,3,3,16]{3,2,1,0} parameter(1)
  %a = bf16[64,128]{1,0} parameter(2)
  %b = bf16[128,256]{1,0} parameter(3)
  %cudnn-conv.1 = (bf16[2,4,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%images, %kernel), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %get-tuple-element.1 = bf16[2,4,4,32]{3,2,1,0} get-tuple-element(%cudnn-conv.1), index=0
  %cudnn-conv-bw-input.1 = (bf16[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%get-tuple-element.1, %kernel), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %cudnn-conv-bw-filter.1 = (bf16[32,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%images, %get-tuple-element.1), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %get-tuple-element.2 = bf16[32,3,3,16]{3,2,1,0} get-tuple-element(%cudnn-conv-bw-filter.1), index=0
  %custom-call.3 = (bf16[64,256]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %all-gather-start.1 = ((bf16[8]{0}, pred[8]{0}), (bf16[64]{0}, /*index=1*/pred[64]{0})) all-gather-start(%x, %y), dimensions={0}
  %all-gather-done.1 = (bf16[64]{0}, /*index=1*/pred[64]{0}) all-gather-done(%all-gather-start.1), metadata={op_name="jit(step)/(jvp()/dot_general:optimizer/sort)"}
  %reduce-scatter-start = ((f32[64,8]{1,0}), f32[8,8]{1,0}) reduce-scatter-start(%z), dimensions={0}, to_apply=%add.1
  %reduce-scatter-done = f32[8,8]{1,0} reduce-scatter-done(%reduce-scatter-start)
  ROOT %fusion.1 = bf16[32,3,3,16]{3,2,1,0} fusion(%get-tuple-element.2), kind=kLoop, calls=%fused.1
}
"""  # noqa: E501


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
        (
            "h100",
            "`topology` must give the number of GPUs, or of machines and of GPUs in each; use",
        ),
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


def test_arithmetic_of_a_program():
    convolution = 2 * 4 * 4 * 32 * 9 * 16  # the same for both of its gradients
    products = (4 + 1) * 64 * 256 * 128
    assert programs.costs(PROGRAM)["flops"] == 2 * (3 * convolution + products)
    assert programs.costs("")["flops"] == 0


def test_arithmetic_is_that_of_xla():
    """Where XLA counts, too: on a CPU, for a convolution without padding."""

    def apply(images, kernel, matrix):
        layout = "NHWC", "HWIO", "NHWC"
        out = jax.lax.conv_general_dilated(
            images, kernel, (2, 2), "VALID", dimension_numbers=layout, feature_group_count=2
        )
        return out.reshape(4, -1) @ matrix

    arrays = jnp.ones((4, 17, 17, 8)), jnp.ones((3, 3, 4, 16)), jnp.ones((1024, 10))
    compiled = jax.jit(apply).lower(*arrays).compile()
    found = programs.costs(compiled.as_text())["flops"]
    assert found == pytest.approx(compiled.cost_analysis()["flops"], rel=1e-3)


def test_exchanges_of_a_program():
    """Both are asynchronous; the gather joins two, one of them of pruning."""
    gather, scatter = programs.collectives(PROGRAM)
    assert gather[:3] == ("all-gather", 3 * 64, (64, 64))
    assert scatter[:3] == ("reduce-scatter", 4 * 64, (64,))
    assert not checks.check_gathers([gather], 64).passed


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
