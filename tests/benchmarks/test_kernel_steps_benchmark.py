"""The benchmark of whole steps: its programs agree, and its ratios are those of a known clock."""

import itertools

import numpy as np
import pytest

from jaxprune import kernels
from tests.support import benchmarks

bench = benchmarks.load("kernel_steps")


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.NAMES)
def test_programs_agree(name, tmp_path, monkeypatch):
    if reason := kernels.available():
        pytest.skip(reason)
    monkeypatch.setattr(kernels._table, "user_cache", lambda: tmp_path)
    kernels._table.saved_table(clock=lambda case, density: kernels.Ratio(2.0, 2.0))
    programs = bench.arms(name, [0.9], False, 1, scale=16)  # it compares the steps itself
    modes = [("step", "dense", None), ("inference", "dense", None)]
    if name == "mobilenet_v1":
        modes += [("step", "depthwise", None), ("inference", "depthwise", None)]
    modes += [("step", "sparse", 0.9), ("inference", "sparse", 0.9)]
    assert list(programs) == modes
    outputs = {mode: np.asarray(programs["inference", *mode]()) for mode in
               (("dense", None), ("sparse", 0.9))}  # fmt: skip
    np.testing.assert_allclose(*outputs.values(), rtol=1e-3, atol=1e-4)


def test_ratios_are_those_within_a_round():
    keys = [("step", "dense", None), ("step", "sparse", 0.9)]
    # The first round warms up; then dense takes 4 and 8 seconds, sparse 2 and 2.
    seconds = [(9, 9), (4, 2), (8, 2)]
    ticks = itertools.accumulate(
        x for n, own in enumerate(seconds) for s in own for x in ([1, s] if n else [1])
    )
    times = bench.measure({key: lambda: None for key in keys}, 2, ticks.__next__)
    dense, sparse = bench.rows_of("net", times)
    assert dense["ratio"] == [1.0, 1.0, 1.0] and sparse["ratio"] == [2.5, 3.0, 3.5]
    assert bench.show(sparse) == "| net | step | sparse | 90% | 2000.0 | 3.00 (2.50-3.50) |"
