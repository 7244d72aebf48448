"""Ramps against their formulas on the host and under jit, and the calendar of mask updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune import schedules
from tests.support.reference import cosine, cubic

WINDOWS = st.tuples(st.integers(0, 1000), st.integers(1, 5000)).map(lambda w: (w[0], sum(w)))
FRACTIONS = st.floats(0, 1, allow_subnormal=False)
STEPS = st.integers(0, 10_000)


@pytest.mark.slow
@given(step=STEPS, initial=FRACTIONS, final=FRACTIONS, window=WINDOWS)
def test_cubic_is_the_formula(step, initial, final, window):
    ramp = schedules.cubic(final, *window, initial=initial)
    wanted = cubic(step, initial, final, *window)
    assert math.isclose(ramp(step), wanted, rel_tol=1e-12, abs_tol=1e-12)
    assert np.asarray(ramp(step)).dtype == np.float64
    traced = jax.jit(ramp)(step)
    assert traced.dtype == jnp.float32
    assert math.isclose(float(traced), wanted, rel_tol=1e-5, abs_tol=1e-6)


@given(step=STEPS, initial=FRACTIONS, window=WINDOWS)
def test_cosine_is_the_formula(step, initial, window):
    fraction = schedules.cosine(initial, *window)
    wanted = cosine(step, initial, *window)
    assert math.isclose(fraction(step), wanted, rel_tol=1e-12, abs_tol=1e-12)
    traced = jax.jit(fraction)(step)
    assert traced.dtype == jnp.float32
    assert math.isclose(float(traced), wanted, rel_tol=1e-5, abs_tol=1e-6)


@given(window=WINDOWS)
def test_end_points_are_exact(window):
    start, stop = window
    ramp = schedules.cubic(0.72, start, stop)
    assert [ramp(0), ramp(start)] == [0, 0]
    assert [ramp(stop), ramp(stop + 1)] == [0.72, 0.72]
    fraction = schedules.cosine(0.3, start, stop)
    assert [fraction(0), fraction(start)] == [0.3, 0.3]
    assert [fraction(stop), fraction(stop + 1)] == [0, 0]


def test_cubic_rises_and_slows_down():
    ramp = schedules.cubic(0.9, 10, 110)
    values = np.array([ramp(step) for step in range(10, 111)])
    assert (np.diff(values) > 0).all()
    assert (np.diff(values, 2) < 0).all()
    assert ramp(60) == pytest.approx(0.9 * 7 / 8)


@pytest.mark.parametrize("step", [0, 4, 5, 6, 100])
def test_start_equal_to_stop_is_one_step(step):
    ramp, fraction = schedules.cubic(0.8, 5, 5, initial=0.25), schedules.cosine(0.5, 5, 5)
    wanted = (0.8, 0.0) if step >= 5 else (0.25, 0.5)
    assert (ramp(step), fraction(step)) == pytest.approx(wanted, abs=1e-15)
    assert float(jax.jit(ramp)(step)) == pytest.approx(wanted[0], abs=1e-7)
    assert float(jax.jit(fraction)(step)) == pytest.approx(wanted[1], abs=1e-7)


# ---- mask_update_steps


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ((0, 250, 100), [0, 100, 200, 250]),
        ((0, 200, 100), [0, 100, 200]),
        ((7, 8, 100), [7, 8]),
        ((5, 5, 100), [5]),
        ((0, 3, 1), [0, 1, 2, 3]),
    ],
)
def test_mask_update_steps(arguments, steps):
    assert schedules.mask_update_steps(*arguments) == steps


@given(start=st.integers(0, 50), length=st.integers(0, 200), every=st.integers(1, 60))
def test_mask_update_steps_rise_evenly_and_end_at_stop(start, length, every):
    steps = schedules.mask_update_steps(start, start + length, every)
    assert (steps[0], steps[-1]) == (start, start + length)
    gaps = np.diff(steps)
    assert (gaps[:-1] == every).all()
    assert ((gaps > 0) & (gaps <= every)).all()


# ---- sparsity_at


def test_sparsity_at_gives_the_decimal_that_was_meant():
    for percent in range(100):
        wanted = percent / 100
        assert schedules.sparsity_at(optax.constant_schedule(wanted), 3) == wanted
        assert schedules.sparsity_at(lambda step, s=wanted: jnp.float32(s), 3) == wanted
        assert schedules.sparsity_at(lambda step, s=wanted: np.float32(s), 3) == wanted
    ramp = optax.linear_schedule(0.0, 0.72, 100)
    assert [schedules.sparsity_at(ramp, step) for step in (0, 50, 100)] == [0, 0.36, 0.72]
    assert schedules.sparsity_at(schedules.cubic(0.72, 0, 10), 10) == 0.72
    assert type(schedules.sparsity_at(ramp, 50)) is float


def test_sparsity_at_is_concrete_inside_jit():
    seen = []

    @jax.jit
    def traced(x):
        seen.append(schedules.sparsity_at(optax.linear_schedule(0.0, 0.72, 100), 50))
        return x

    traced(1.0)
    assert seen == [0.36]
