"""Sparse kernels with `jax_enable_x64`: float32 has kernels, float64 is dense, dtypes are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import kernels


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernels_under_x64(dtype):
    draws = np.random.default_rng(0)
    mask = {"w": draws.random((8, 6)) < 0.5}
    with jax.enable_x64(True):
        x = jnp.asarray(draws.normal(size=(5, 8)), dtype)
        params = {"w": jnp.asarray(draws.normal(size=(8, 6)) * mask["w"], dtype)}
        wrapped = kernels.wrap(lambda p, x: x @ p["w"], mask, params, x, table="always")
        assert list(wrapped.indices) == (["w"] if dtype == "float32" else [])
        y = jax.jit(wrapped)(params, x)
        slopes = jax.grad(lambda p: wrapped(p, x).sum())(params)["w"]
        assert y.dtype == slopes.dtype == dtype
        np.testing.assert_allclose(y, x @ params["w"], rtol=1e-5, atol=1e-6)
        kept = np.tile(np.asarray(x).sum(0)[:, None], 6)
        np.testing.assert_allclose(slopes[mask["w"]], kept[mask["w"]], rtol=1e-5, atol=1e-6)
