"""scripts/compile_for_tpu.py --blocks: its figures, its checks, and a run."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import kernels
from jaxprune.experiments.ahead import blocks
from jaxprune.experiments.ahead import compile as compile_for_tpu
from tests.experiments.test_compile_for_tpu import SCRIPT


@pytest.fixture
def small(monkeypatch):
    """A layer of 512 x 1024 for 256 tokens."""
    for name, value in {"ROWS": 256, "INPUTS": 512, "OUTPUTS": 1024}.items():
        monkeypatch.setattr(blocks, name, value)


def figures(name="y", density=0.25, factor=1.0, calls=1, temporaries=0):
    cost = blocks.at_least(name, blocks.kept_of(128, density))
    cost = cost._replace(flops=factor * cost.flops)
    return blocks.Figures(name, 128, density, 1.0, cost, 10, calls, temporaries)


def test_indices_have_the_density(small):
    indices = blocks.indices_of(128, 0.25)
    assert indices.mask.shape == (4, 8) and int(indices.mask.sum()) == 8
    assert blocks.kept_of(128, 0.25) == 8 * 128**2 and blocks.kept_of(256, 0.1) == 256**2
    kernels.check_block_indices(indices)


def test_least_costs(small):
    kept = 3 * 128**2
    flops, arrays = 2 * 256 * kept, 2 * 256 * (512 + 1024)
    assert blocks.at_least("y", kept) == blocks.at_least("dx", kept)
    assert blocks.at_least("y", kept) == (flops, arrays + 2 * kept)
    assert blocks.at_least("dw", kept) == (flops, arrays + 2 * 512 * 1024)


def test_bound():
    peak = blocks.Peak(flops=100.0, bandwidth=10.0)
    assert blocks.bound(blocks.Cost(200.0, 10.0), peak) == (2.0, "arithmetic")
    assert blocks.bound(blocks.Cost(200.0, 50.0), peak) == (5.0, "memory")


def test_table(small):
    lines = blocks.table([figures(), figures("dw")], blocks.Peak(1e12, 1e12))
    assert len(lines) == 4 and lines[1].split()[:3] == ["dense", "0", "2"]
    assert lines[2].split()[-2:] == ["0.25", "arithmetic"] and lines[3].split()[0] == "dw"


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, [True, True, True]),
        ({"calls": 0}, [False, True, True]),
        ({"calls": 2}, [False, True, True]),
        ({"factor": 1.03}, [True, False, True]),
        ({"temporaries": 2 * 256 * 512}, [True, True, False]),
    ],
)
def test_checks(small, change, passed):
    found = [figures(), figures("dx", 0.1, **change), figures("dw", 1.0)]
    assert [own.passed for own in blocks.check_all(found)] == passed


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_grids_and_costs_of_programs(small, platform):
    """What the kernels say of themselves, from the jaxpr: no compiler is needed."""
    indices = blocks.indices_of(128, 0.25)
    x, kernel, dy = (jnp.ones(own, jnp.bfloat16) for own in ((256, 512), (512, 1024), (256, 1024)))

    def run(x, kernel, indices):
        return jax.vjp(lambda *own: kernels.block_product(*own, indices), x, kernel)[1](dy)

    jaxpr = jax.jit(run).trace(x, kernel, indices).jaxpr.jaxpr
    found = blocks.grids(jaxpr)
    names = {f"block_product_{name}_{own}" for name in blocks.PASSES for own in ("tpu", "cuda")}
    assert set(found) == names
    own = [found[f"block_product_{name}_{platform}"] for name in blocks.PASSES]
    # One tile of 256 rows; 8 kept blocks, and as many steps more as the list has blocks of results:
    # on a TPU `dx` is summed while all of its columns stay, in the order of `y`.
    assert own == ([(1, 16), (1, 16), (12, 1)] if platform == "tpu" else [(2, 8), (2, 4), (4, 8)])
    costs = dict(estimates(jaxpr))
    kept = 8 * 128**2
    if platform == "tpu":
        for name in ("y", "dx"):
            cost = costs[f"block_product_{name}_tpu"]
            assert (cost.flops, cost.bytes_accessed) == blocks.at_least(name, kept)
        cost = costs["block_product_dw_tpu"]
        # x once, a tile of dy for each kept block, and the blocks.
        assert cost.bytes_accessed == 2 * (256 * 512 + 8 * 256 * 128 + kept)


def estimates(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield str(equation.params["name"]), equation.params["cost_estimate"]
        for inner in blocks.jaxprs_in_params(equation.params):
            yield from estimates(inner)


def test_lowers_for_absent_devices(small):
    """The passes that the command compiles are one kernel each, also without libtpu and CUDA."""
    indices = blocks.indices_of(128, 0.1)
    x, kernel = jnp.ones((256, 512), jnp.bfloat16), jnp.ones((512, 1024), jnp.bfloat16)
    traced = jax.jit(kernels.block_product).trace(x, kernel, indices)
    for platform, target in blocks.TARGETS.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count(f"@{target}(") == 1


def test_a_cpu_has_no_kernel():
    with pytest.raises(SystemExit) as stopped:
        compile_for_tpu.main(["--platform", "cpu", "--blocks", "--config", "digits_resnet8"])
    assert "`platform` must be tpu or cuda with `--blocks`, but is cpu" in str(stopped.value)


def test_peaks_are_those_of_all_devices():
    from jaxprune import programs

    assert set(blocks.PEAKS) == {*programs.TPUS, *programs.GPUS}
    assert all(np.isfinite(own).all() for own in blocks.PEAKS.values())


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the compiler of TPUs, is not installed: `make tpu-check` has it",
)
def test_a_run_for_a_tpu():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(SCRIPT), "--blocks", "--topology", "v5e:2x4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "27 of 27 programs have one kernel each" in done.stdout
