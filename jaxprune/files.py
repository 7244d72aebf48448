"""Atomic writes: a file is the old one or complete, whatever happens meanwhile."""

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that takes the place of `path` when the block ends, and not before.

    The content is written beside `path`, forced to disk, and renamed. If the block raises, the new
    file is deleted and the old one stays. If the process is killed, the old one stays too, and a
    hidden file `.NAME.*.tmp` may remain beside it. Of several writers at once the last one wins.

    Args:
        path: the file; its folder must exist. Its permissions stay; those of a new file are what
            `open` would give. A file that is read-only is replaced, too, and a symbolic link is
            replaced by the file instead of followed.
        mode: "w" for text in UTF-8 or "wb" for bytes.

    Yields:
        The open file.

    Raises:
        ValueError: `mode` is another one.
        OSError: the file cannot be written or renamed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "a.txt")
        >>> with replacing(path) as file:
        ...     _ = file.write("new")
        ...     path.exists()
        False
        >>> path.read_text()
        'new'
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"`mode` must be 'w' or 'wb'; got {mode!r}")
    path = Path(path)
    # Not `tempfile`: its files are private whatever the umask says.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    encoding = "utf-8" if mode == "w" else None
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Forces a new name to disk, so that it outlives a failure of the machine."""
    with contextlib.suppress(OSError):  # some systems do not open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
