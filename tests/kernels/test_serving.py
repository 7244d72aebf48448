"""`kernels.serve`: batches, padding, threads, errors and the end."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import kernels
from tests.support.sparse import drawn_masks

PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 5))}
MASKS = drawn_masks(PARAMS, 0.5)
PARAMS = jaxprune.apply_masks(PARAMS, MASKS)
EXAMPLE = jax.ShapeDtypeStruct((6,), jnp.float32)


def apply(params, batch):
    return {"logits": batch @ params["w"], "first": batch[:, 0]}


def served(**options):
    options = {"sizes": (1, 4), "table": "always"} | options
    return kernels.serve(apply, MASKS, PARAMS, EXAMPLE, **options)


def row(number):
    return np.random.default_rng(number).normal(size=6).astype(np.float32)


def test_answers_are_those_of_the_function():
    with served() as server:
        futures = [server.submit(row(n)) for n in range(11)]
        answers = [future.result(timeout=60) for future in futures]
    wanted = apply(PARAMS, np.stack([row(n) for n in range(11)]))
    for number, answer in enumerate(answers):
        assert answer["logits"].shape == (5,) and answer["first"].shape == ()
        np.testing.assert_allclose(answer["logits"], wanted["logits"][number], rtol=1e-5)
    assert server.examples == 11 and 3 <= server.batches <= 11


def test_many_threads_at_once():
    found = {}

    def ask(number):
        found[number] = server(row(number))["logits"]

    with served(wait=0.01) as server:
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    wanted = np.asarray(apply(PARAMS, np.stack([row(n) for n in range(20)]))["logits"])
    np.testing.assert_allclose(np.stack([found[n] for n in range(20)]), wanted, rtol=1e-5)


def gated(sizes, gate, seen):
    """A server whose function waits for `gate` and tells the sizes of its batches."""

    def run(batch):
        seen.append(len(batch))
        gate.wait(60)
        return batch

    return kernels.Server(run, sizes, EXAMPLE)


def test_what_waits_runs_together_padded_to_the_next_size():
    gate, seen = threading.Event(), []
    with gated((2, 4), gate, seen) as server:
        first = server.submit(row(0))
        while not seen:  # the thread has taken the first request and waits
            pass
        rest = [server.submit(row(n)) for n in range(1, 8)]
        gate.set()
        for number, future in enumerate([first, *rest]):
            np.testing.assert_array_equal(future.result(timeout=60), row(number))
    assert seen == [2, 4, 4]  # 1, 4 and 3 requests
    assert (server.batches, server.examples) == (3, 8)


def test_nothing_compiles_after_the_start():
    traces = []

    def counting(params, batch):
        traces.append(batch.shape)
        return batch @ params["w"]

    with kernels.serve(counting, MASKS, PARAMS, EXAMPLE, sizes=(1, 4), table="always") as server:
        before = len(traces)
        for _ in range(3):
            server(row(0))
            [future.result(60) for future in [server.submit(row(n)) for n in range(5)]]
    assert len(traces) == before and {shape[0] for shape in traces} == {1, 4}


def test_an_error_of_the_function_is_that_of_its_requests():
    def run(batch):
        if np.any(batch < 0):
            raise FloatingPointError("negative")
        return batch

    with kernels.Server(run, [1], EXAMPLE) as server:
        with pytest.raises(FloatingPointError, match="negative"):
            server(-np.ones(6, np.float32))
        assert server(np.ones(6, np.float32)).tolist() == [1.0] * 6


def test_a_closed_server_answers_what_is_queued_and_refuses_more():
    gate, seen = threading.Event(), []
    server = gated((1,), gate, seen)
    futures = [server.submit(row(n)) for n in range(3)]
    closing = threading.Thread(target=server.close)
    closing.start()
    gate.set()
    closing.join(timeout=60)
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="the server is closed"):
        server.submit(row(0))
    server.close()  # twice is no error


def test_a_cancelled_request_is_not_computed():
    gate, seen = threading.Event(), []
    with gated((1,), gate, seen) as server:
        first = server.submit(row(0))
        while not seen:
            pass
        cancelled = server.submit(row(1))
        assert cancelled.cancel()
        gate.set()
        first.result(timeout=60)
    assert seen == [1]


def test_bad_examples_are_refused_at_once():
    with served() as server:
        with pytest.raises(ValueError, match=r"float32\[6\], but is float32\[2, 6\]"):
            server(np.ones((2, 6), np.float32))
        with pytest.raises(ValueError, match="`example` must be one example"):
            server({"x": row(0)})


@pytest.mark.parametrize("sizes", [(), (0, 4), (1.5,)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="`sizes` must be whole numbers of at least 1"):
        served(sizes=sizes)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="`wait` must be at least 0"):
        served(wait=-1)
    with pytest.raises(
        ValueError, match=r"first axis is the batch, here of 1:\n  total: shape \(\)"
    ):
        kernels.serve(
            lambda p, x: {"total": (x @ p["w"]).sum()}, MASKS, PARAMS, EXAMPLE, table="always"
        )
