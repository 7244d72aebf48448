"""Several processes of one run: the first decides and writes, all know; values of all on the host.

Everything here is for one process as well. With several, all of them have to make each call, in the
same order.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["from_first", "on_first", "on_host"]


def on_first(call: Callable[[], Any]) -> Any:
    """Calls a function on the first process; all processes go on with what it returned.

    What decides how a run goes on is read this way, so that all take the same way whatever their
    file systems show them at that moment. What others may read is written this way: nobody goes on
    before it is there.

    Args:
        call: returns what is ready for JSON. It must not wait for other processes.

    Returns:
        What it returned; with several processes as JSON gives it back.

    Raises:
        Exception: what it raised; on the others a ValueError with the same message.

    Example:
        >>> on_first(lambda: {"step": 3})
        {'step': 3}
    """
    if jax.process_count() == 1:
        return call()
    text, raised = "", None
    if jax.process_index() == 0:
        try:
            text = json.dumps([call(), None])
        except Exception as error:  # nobody may wait in vain
            text, raised = json.dumps([None, str(error)]), error
    value, message = json.loads(_broadcast(text.encode()))
    if raised is not None:
        raise raised
    if message is not None:
        raise ValueError(message)
    return value


def _broadcast(text: bytes) -> bytes:
    """The bytes of the first process, on all of them."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    # Each size is a program, so there are few sizes.
    padded = np.zeros(max(1024, 1 << (length - 1).bit_length()), np.uint8)
    if jax.process_index() == 0:
        padded[:length] = np.frombuffer(text, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(padded)[:length])


def from_first(tree: Any) -> Any:
    """Arrays that each process has computed for itself, as the first one has them.

    Another machine may round otherwise; a ranking of such numbers may then be another one.

    Args:
        tree: arrays of the same shapes and dtypes on all processes.

    Returns:
        The tree of the first process.

    Example:
        >>> from_first({"mask": np.array([True, False])})["mask"].tolist()
        [True, False]
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.broadcast_one_to_all(jax.tree.map(on_host, tree))


def on_host(array: Any) -> np.ndarray:
    """All of an array, also of one that is spread over processes.

    Args:
        array: of numbers, on any devices.

    Returns:
        A NumPy array.

    Example:
        >>> import jax.numpy as jnp
        >>> on_host(jnp.arange(3)).tolist()
        [0, 1, 2]
    """
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
