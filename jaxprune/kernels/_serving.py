"""Serves a pruned function in this process: requests of several threads run as one batch."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.jaxprs import split
from jaxprune.kernels._wrapping import Table, wrap

__all__ = ["Server", "serve"]


class Server:
    """Runs requests in batches on a thread of its own, from `serve`; close it, or use `with`.

    It may be called from any thread. What waits when the thread is free runs together, padded to
    the next of a few batch sizes, all of which were compiled before the first request.

    Args:
        run: compiled function from a batch to outputs, arrays whose first axis is the batch.
        sizes: batch sizes, ascending.
        example: types of one example, a tree.
        wait: seconds to wait for more requests after the first of a batch.

    Example:
        >>> example = jax.ShapeDtypeStruct((3,), jnp.float32)
        >>> with Server(lambda x: 2 * x, [1, 4], example) as server:
        ...     float(server(np.ones(3, np.float32))[0])
        2.0
    """

    def __init__(
        self,
        run: Callable[[Any], Any],
        sizes: Sequence[int],
        example: Any,
        wait: float = 0.0,
    ) -> None:
        """Starts the thread."""
        self._run, self._sizes, self._example, self._wait = run, tuple(sizes), example, wait
        self._requests: queue.SimpleQueue[tuple[Any, Future] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._is_closed = False
        self.batches = 0  # batches so far
        self.examples = 0  # requests so far
        self._thread = threading.Thread(target=self._work, name="jaxprune-server", daemon=True)
        self._thread.start()

    def __call__(self, example: Any) -> Any:
        """Computes the output for one example, without a batch axis, and waits for it."""
        return self.submit(example).result()

    def submit(self, example: Any) -> Future:
        """Queues one example and returns at once.

        Args:
            example: tree of arrays of the shapes of one example.

        Returns:
            A `concurrent.futures.Future` of its output. An error of the function is its error.

        Raises:
            ValueError: if the shapes or the structure differ from those of the example.
            RuntimeError: if the server is closed.
        """
        example = jax.tree.map(np.asarray, example)
        found, wanted = map(_types, (example, self._example))
        if found != wanted:
            raise ValueError(
                f"`example` must be one example without a batch axis, {wanted}, but is {found}"
            )
        future: Future = Future()
        with self._closing:
            if self._is_closed:
                raise RuntimeError("the server is closed; make another one with `kernels.serve`")
            self._requests.put((example, future))
        return future

    def close(self) -> None:
        """Answers what is queued and stops the thread."""
        with self._closing:
            if not self._is_closed:
                self._requests.put(None)
            self._is_closed = True
        self._thread.join()

    def __enter__(self) -> "Server":
        """Returns the server itself."""
        return self

    def __exit__(self, *exception: Any) -> None:
        """Closes it."""
        self.close()

    def _work(self) -> None:
        """Answers requests until the server is closed."""
        while (request := self._requests.get()) is not None:
            batch, is_last = self._gather(request)
            # A request that was cancelled is not computed.
            batch = [one for one in batch if one[1].set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)
            if is_last:
                return

    def _gather(self, first: tuple[Any, Future]) -> tuple[list[tuple[Any, Future]], bool]:
        """Returns the requests of a batch, and whether the server is closed after them."""
        batch, until = [first], time.monotonic() + self._wait
        while len(batch) < self._sizes[-1]:
            try:
                more = self._requests.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if more is None:
                return batch, True
            batch.append(more)
        return batch, False

    def _answer(self, batch: list[tuple[Any, Future]]) -> None:
        """Runs a batch and answers its requests."""
        size = next(size for size in self._sizes if size >= len(batch))
        examples = [example for example, _ in batch]
        examples += examples[:1] * (size - len(batch))
        try:
            stacked = jax.tree.map(lambda *each: np.stack(each), *examples)
            outputs = jax.device_get(self._run(stacked))
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        self.batches, self.examples = self.batches + 1, self.examples + len(batch)
        for index, (_, future) in enumerate(batch):
            future.set_result(jax.tree.map(lambda out, index=index: out[index], outputs))


def serve(
    function: Callable[[Any, Any], Any],
    masks: Any,
    params: Any,
    example: Any,
    *,
    sizes: Sequence[int] = (1, 8, 32),
    wait: float = 0.001,
    table: Table = None,
) -> Server:
    """Serves a pruned function in this process with sparse kernels.

    Sparse kernels are custom calls that are built where they run, so `export.jax` cannot write
    them into a file. A server in Python calls the function itself instead. Each batch size is
    wrapped and compiled by itself, because what pays depends on it; after that nothing compiles.

    Args:
        function: `function(params, batch) -> outputs`; the first axis of all arrays of `batch` and
            of the outputs numbers the examples, and examples do not affect each other.
        masks: tree of bools like `params`, True where a weight is kept.
        params: tree of arrays.
        example: one example without a batch axis: a tree of arrays or `jax.ShapeDtypeStruct`.
        sizes: batch sizes to compile. A batch is padded to the next of them.
        wait: seconds to wait for more requests after the first of a batch: more is a larger batch
            and a longer answer. 0 takes what is queued.
        table: see `wrap`; the forward pass alone must pay.

    Returns:
        A `Server`.

    Raises:
        ValueError: if `sizes` is empty or not whole numbers of at least 1, `wait` is negative, an
            output lacks the batch axis, or the masks do not fit.

    Example:
        >>> masks = {"w": jnp.eye(3, dtype=bool)}
        >>> function = lambda params, x: x @ params["w"]
        >>> x = np.arange(3, dtype=np.float32)
        >>> with serve(function, masks, {"w": jnp.eye(3)}, x, table="always") as server:
        ...     server(x).tolist()
        [0.0, 1.0, 2.0]
    """
    whole = [isinstance(size, int) and size >= 1 for size in sizes]
    if not sizes or not all(whole):
        raise ValueError(f"`sizes` must be whole numbers of at least 1, but is {tuple(sizes)}")
    if wait < 0:
        raise ValueError(f"`wait` must be at least 0 seconds, but is {wait}")
    ordered = sorted(set(sizes))
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), example)
    programs = {size: _program(function, masks, params, one, size, table) for size in ordered}

    def run(batch: Any) -> Any:
        return programs[len(jax.tree.leaves(batch)[0])](batch)

    return Server(run, ordered, one, wait)


def _program(
    function: Callable[[Any, Any], Any], masks: Any, params: Any, one: Any, size: int, table: Table
) -> Callable[[Any], Any]:
    """Compiles the function for a batch size."""
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), one)
    wrapped = wrap(function, masks, params, batch, table=table, gradients=False)
    parts = split(params)

    def call(arrays: Any, indices: Any, batch: Any) -> Any:
        return wrapped(parts.tree(arrays), batch, indices=indices)

    shapes = jax.eval_shape(call, parts.arrays, wrapped.indices, batch)
    trees.raise_for(
        [
            f"{path or 'the output'}: shape {leaf.shape}"
            for path, leaf in trees.leaves_with_paths(shapes)
            if leaf.shape[:1] != (size,)
        ],
        f"`function` must return arrays whose first axis is the batch, here of {size}:",
    )
    arrays = list(map(jnp.asarray, parts.arrays))
    compiled = jax.jit(call).lower(arrays, wrapped.indices, batch).compile()
    return lambda batch: compiled(arrays, wrapped.indices, batch)


def _types(tree: Any) -> str:
    """Describes a tree of arrays."""
    named = [
        f"{path}: {np.dtype(x.dtype)}{list(x.shape)}" for path, x in trees.leaves_with_paths(tree)
    ]
    return ", ".join(own.removeprefix(": ") for own in named)
