"""The C++ sources without JAX under sanitizers, and their checks behind XLA."""

import concurrent.futures
import functools
import re
import subprocess

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxprune import kernels
from jaxprune.kernels import _building
from tests.conftest import ROOT

DRIVER = ROOT / "tests" / "kernels" / "driver.cc"


@pytest.fixture(autouse=True)
def library():
    """These tests need the library."""
    if reason := kernels.available():
        pytest.skip(reason)


# Widths of vectors: this machine's, and fewer lanes where the compiler knows the flags.
@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("-march=native", "-fsanitize=thread"),
        ("-O2", "-fsanitize=undefined", "-fno-sanitize-recover=all"),
    ],
    ids=["addresses", "threads", "narrow"],
)
def test_sanitizers(flags, tmp_path):
    """Values, derivatives and random lists of indices, with one thread and with several."""
    program = tmp_path / "driver"
    command = [_building.compiler(), "-std=c++17", "-O1", "-g", "-pthread", *flags]
    command += [f"-I{_building.SOURCES}", str(DRIVER), "-o", str(program)]
    build = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in build.stderr or "unsupported" in build.stderr:
        pytest.skip(f"this compiler has no such sanitizer: {build.stderr[-200:]}")
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program), "60"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = run.stdout.splitlines()
    refused, _ = map(int, re.findall(r"\d+", first))
    assert 300 < refused < 1100, run.stdout  # most random lists are wrong, and some are right
    refused, single, whole = map(int, re.findall(r"\d+", second))
    assert min(refused, single) > 100 and whole > 1000, run.stdout


WILD = st.one_of(st.integers(-2, 9), st.sampled_from([-(2**31), 2**31 - 1, 10**6]))


@pytest.mark.slow
@given(
    starts=st.lists(WILD, min_size=4, max_size=4),
    outputs=st.lists(WILD, min_size=3, max_size=3),
    positions=st.lists(WILD, min_size=3, max_size=3),
)
def test_wild_lists_of_products_are_refused(starts, outputs, positions):
    own = kernels.product_indices(np.eye(3, dtype=bool))
    wild = own._replace(
        starts=jnp.array(starts, jnp.int32),
        outputs=jnp.array(outputs, jnp.int32),
        positions=jnp.array(positions, jnp.int32),
    )
    rises = starts[0] == 0 and starts == sorted(starts) and starts[-1] <= 3
    used = starts[-1] if rises else 0
    right = rises and all(0 <= own < 3 for own in outputs[:used])
    right = right and all(0 <= own < 9 for own in positions[:used])
    check(_product, right, wild)


@pytest.mark.slow
@given(
    count=WILD,
    lists=st.tuples(*[st.lists(WILD, min_size=2, max_size=2)] * 4),
)
def test_wild_lists_of_convolutions_are_refused(count, lists):
    own = kernels.convolution_indices(np.eye(2, dtype=bool)[None, None])
    positions, taps, inputs, outputs = (jnp.array(part, jnp.int32) for part in lists)
    wild = own._replace(
        positions=positions,
        taps=taps,
        inputs=inputs,
        outputs=outputs,
        count=jnp.asarray(count, jnp.int32),
    )
    right = 0 <= count <= 2
    for part, below in zip(lists, (4, 1, 2, 2)):
        right = right and all(0 <= entry < below for entry in part[:count])
    check(_convolution, right, wild)


@jax.jit
def _product(indices):
    def layer(x, w):
        return kernels.sparse_product(x, w, indices)

    return jax.vjp(layer, jnp.ones((2, 3)), jnp.ones((3, 3)))[1](jnp.ones((2, 3)))


@jax.jit
def _convolution(indices):
    def layer(x, w):
        return kernels.sparse_convolution(x, w, indices)

    args = jnp.ones((2, 3, 3, 2)), jnp.ones((1, 1, 2, 2))
    return jax.vjp(layer, *args)[1](jnp.ones((2, 3, 3, 2)))


def check(run, right, indices):
    """Right indices run, and others are errors."""
    if right:
        jax.block_until_ready(run(indices))
        return
    errors = ValueError, jax.errors.JaxRuntimeError  # which of them depends on the version of JAX
    with pytest.raises(errors, match="jaxprune: .*indices"):
        jax.block_until_ready(run(indices))


@pytest.mark.slow
def test_calls_at_the_same_time():
    """Calls of different layers in several threads of one process do not share memory."""
    draw = np.random.default_rng(0)
    jobs = []
    for size in (5, 40, 90):
        mask = draw.random((size, size)) < 0.3
        x = jnp.asarray(draw.normal(size=(200, size)), jnp.float32)
        w = jnp.asarray(draw.normal(size=(size, size)), jnp.float32)
        layer = functools.partial(kernels.sparse_product, indices=kernels.product_indices(mask))
        jobs.append((jax.jit(jax.grad(lambda w, x, f=layer: (f(x, w) ** 2).sum())), w, x))
    for width in (3, 20):
        mask = draw.random((3, 3, width, width)) < 0.3
        x = jnp.asarray(draw.normal(size=(20, 9, 9, width)), jnp.float32)
        w = jnp.asarray(draw.normal(size=mask.shape), jnp.float32)
        indices = kernels.convolution_indices(mask)
        layer = functools.partial(kernels.sparse_convolution, indices=indices)
        jobs.append((jax.jit(jax.grad(lambda w, x, f=layer: (f(x, w) ** 2).sum())), w, x))
    alone = [np.asarray(run(*args)) for run, *args in jobs]
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(10):
            together = pool.map(lambda job: np.asarray(job[0](*job[1:])), jobs)
            for own, expected in zip(together, alone):
                np.testing.assert_array_equal(own, expected)
