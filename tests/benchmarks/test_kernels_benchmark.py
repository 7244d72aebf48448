"""The benchmark of sparse kernels: ratios of a clock that is known, and its table."""

import itertools

import pytest

from jaxprune import kernels
from tests.support import benchmarks

bench = benchmarks.load("kernels")


@pytest.mark.parametrize("shape", ["9x8x7", "2x5x4x3", "2x5x4x3x6x2", "2x5x4x6x3x1-depthwise"])
def test_ratios(shape):
    if reason := kernels.available():
        pytest.skip(reason)
    # Starts and ends of calls in turn: dense ones take 3 seconds, sparse ones 1, 2 and 3.
    seconds = [3, 3, 3, 1, 2, 3] * 2
    ends = itertools.accumulate(second for own in seconds for second in (0, own))
    (row,) = bench.measure(shape, [0.5], 2, ends.__next__)
    assert [row[name] for name in bench.PASSES] == [3, 1.5, 1]
    assert row["all three"] == [1.5, 1.5, 1.5] and row["dense ms"] == 9000
    assert bench.show(row) == (
        f"| {shape} | 50% | 1 | 9000.00 | 3.00 | 1.50 | 1.00 | 1.50 (1.50-1.50) | | |"
    )


def test_ratios_of_blocks():
    """They are compared with dense layers and with as many single weights."""
    if reason := kernels.available():
        pytest.skip(reason)
    # Dense passes take 8 seconds, those of single weights 4, those of blocks 1, 2 and 2.
    seconds = [8, 8, 8, 4, 4, 4, 1, 2, 2] * 2
    ends = itertools.accumulate(second for own in seconds for second in (0, own))
    single, own = bench.measure("9x8x32", [0.5], 2, ends.__next__, (1, 16))
    assert (single["block"], own["block"]) == (1, 16) and "forward of single" not in single
    assert [own[name] for name in bench.PASSES] == [8, 4, 4]
    assert (own["forward of single"], own["all three of single"]) == (4, 12 / 5)
    assert bench.show(own).endswith("| 4.80 (4.80-4.80) | 4.00 | 2.40 |")
