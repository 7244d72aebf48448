"""The benchmark of packed state: bytes of a ResNet-50, and a small run of its arms."""

import pytest

from tests.support import benchmarks


def test_bytes_fall_with_the_density():
    packed = benchmarks.load("packed_state")
    params = packed.shapes()
    dense = packed.state_bytes(params, None)
    weights = sum(leaf.size for leaf in packed.jax.tree.leaves(params))
    assert weights == 25_557_032 and dense == 8 * weights + 4  # and one counter
    ratios = [packed.state_bytes(params, density) / dense for density in packed.DENSITIES]
    # Two averages and a position for each entry, and 5 % more of them than are kept.
    for density, ratio in zip(packed.DENSITIES, ratios, strict=True):
        assert 1.05 * 1.5 * density <= ratio <= 1.05 * 1.5 * density + 0.005


@pytest.mark.slow
def test_both_arms_run():
    record = benchmarks.load("packed_state").measure(4000, 0.2, 2)
    assert record["weights"] == 4 * 32 * 32 and record["ratio"] > 0
