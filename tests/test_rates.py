"""Rate factors: nothing happens in a dense leaf, limits hold, and between them the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import rates

RULES = {
    "by_density": rates.by_density(),
    "by_density, muP": rates.by_density(1.0, limit=100.0),
    "by_statistic": rates.by_statistic(),
    "by_statistic, wide": rates.by_statistic(limit=50.0),
}
STATISTIC = jnp.array([0.0, 1e-30, 1e-3, 1.0, 7.0, 1e30])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("mean", [0.0, 1e-20, 1.0, 3.0, 1e20])
@pytest.mark.parametrize("jit", [False, True])
def test_a_dense_leaf_has_factor_one_exactly(name, mean, jit):
    rule = jax.jit(RULES[name]) if jit else RULES[name]
    factor = rule(STATISTIC, jnp.float32(mean), jnp.float32(1.0))
    assert (factor == 1.0).all()


@given(density=st.floats(0, 1, width=32), power=st.floats(0, 2), limit=st.floats(1, 10))
def test_by_density_is_the_formula(density, power, limit):
    factor = rates.by_density(power, limit)(STATISTIC, jnp.float32(1.0), jnp.float32(density))
    wanted = min(limit, max(density, 1e-12) ** -power)
    assert factor.shape == ()
    np.testing.assert_allclose(factor, wanted, rtol=1e-5)


@given(density=st.floats(0, 1, width=32), mean=st.floats(0.125, 8, width=32))
def test_by_statistic_is_the_formula(density, mean):
    statistic = np.array([[0.0, 0.1, 1.0], [-2.0, 5.0, 100.0]], np.float32)
    factor = rates.by_statistic(3.0)(jnp.asarray(statistic), jnp.float32(mean), density)
    wanted = np.clip(1 + (1 - density) * (np.abs(statistic) / mean - 1), 1 / 3, 3)
    np.testing.assert_allclose(factor, wanted, rtol=2e-5)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("density", [0.0, 1e-30, 0.5, 1.0])
@pytest.mark.parametrize("mean", [0.0, 1e-38, 1.0])
def test_factors_stay_finite_and_within_limits(name, density, mean):
    factor = RULES[name](STATISTIC, jnp.float32(mean), jnp.float32(density))
    limit = {"by_density, muP": 100.0, "by_statistic, wide": 50.0}.get(name, 2.0)
    assert ((factor >= np.float32(1 / limit)) & (factor <= limit)).all()


def test_by_statistic_keeps_the_mean_rate_of_a_leaf_without_limits():
    statistic = jnp.array([0.5, 1.0, 1.5, 2.0])
    factor = rates.by_statistic(1e6)(statistic, jnp.mean(statistic), jnp.float32(0.3))
    assert float(jnp.mean(factor)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rates.by_density(power=-0.5), "`power` must not be negative, but is -0.5"),
        (lambda: rates.by_density(power=float("nan")), "`power`"),
        (lambda: rates.by_density(limit=0.5), "`limit` must be at least 1, but is 0.5"),
        (lambda: rates.by_statistic(limit=0.0), "`limit` must be at least 1, but is 0.0"),
        (lambda: rates.by_statistic(limit=float("nan")), "`limit`"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
