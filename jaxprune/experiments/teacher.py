"""The wide network that teaches the narrow one: its file in the folder of a run."""

from pathlib import Path
from typing import Any

import jax

from jaxprune import processes, sharding, storage

NAME = "teacher.npz"


def write_teacher(path: Path, variables: Any) -> None:
    """Writes variables bit for bit, atomically and once for all processes.

    A file of an earlier attempt is replaced.
    """
    own = jax.tree.map(processes.on_host, variables)

    def write() -> None:
        storage.save(path, own, compression=None, overwrite=True)

    processes.on_first(write)


def read_teacher(path: Path, like: Any) -> Any:
    """Reads what `write_teacher` has written.

    Args:
        path: the file.
        like: tree of `jax.ShapeDtypeStruct` with the shardings of the result.

    Raises:
        ValueError: the file is absent, damaged, or of a different network.
    """
    fix = "put a copy of it back, or train again with `--overwrite`"
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    try:
        variables, _ = storage.load(path, shapes)
    except FileNotFoundError:
        raise ValueError(
            f"teacher {path} is absent, but the run goes on with it after its first cut: {fix}"
        ) from None
    except ValueError as error:
        raise ValueError(f"teacher {path} is corrupt ({error}): {fix}") from error
    return jax.tree.map(lambda x, like: sharding.put(x, like.sharding), variables, like)
