"""Atomic writes: a file is the old one or complete, whatever happens meanwhile."""

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxprune.files._locks import NO_FOLLOW, is_same, try_lock


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that takes the place of `path` when the block ends, and not before.

    The content is written beside `path`, forced to disk, and renamed. If the block raises, the new
    file is deleted and the old one stays. If the process is killed, the old one stays too, and a
    hidden file `.NAME.*.tmp` may remain beside it, which the next writer of `path` deletes. Of
    several writers at once the last one wins.

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
    _delete_left(path)
    # Not `tempfile`: its files are private whatever the umask says.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    encoding = "utf-8" if mode == "w" else None
    try:
        with naming(path), open(temporary, mode.replace("w", "x"), encoding=encoding) as file:
            try_lock(file.fileno())  # as long as it is written, nobody deletes it
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


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names a file in the errors of the system that name none, such as that of a full disk.

    Args:
        path: the file.

    Example:
        >>> with naming("a.txt"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device: 'a.txt'
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def appending(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a file to append bytes to it, and follows no symbolic link out of its folder.

    Args:
        path: the file; its folder must exist.

    Returns:
        The open file.

    Raises:
        ValueError: if `path` is a symbolic link.
        OSError: if it cannot be opened.

    Example:
        >>> import tempfile
        >>> with appending(tempfile.mkdtemp() + "/log.txt") as file:
        ...     file.write(b"a line")
        6
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW
        return os.fdopen(os.open(path, flags, 0o666), "ab")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK) and os.path.islink(path):
            raise ValueError(
                f"{path} must be a file, but is a symbolic link to {os.readlink(path)}; remove it"
            ) from None
        raise


def _delete_left(path: Path) -> None:
    """Deletes what killed writers of a path have left; what is being written is locked."""
    start = f".{path.name}."
    try:
        with os.scandir(path.parent) as entries:
            names = [own.name for own in entries if own.name.startswith(start)]
    except OSError:
        return
    for name in names:
        code = name[len(start) :].removesuffix(".tmp")
        if len(code) != 32 or not set(code) <= set("0123456789abcdef"):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path.with_name(name), os.O_RDWR | NO_FOLLOW)
            try:
                # A writer locks its file a moment after it has made it.
                is_old = time.time() - os.fstat(descriptor).st_mtime > 1
                if is_old and try_lock(descriptor) and is_same(path.with_name(name), descriptor):
                    os.unlink(path.with_name(name))
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Forces a new name to disk, so that it outlives a failure of the machine."""
    with contextlib.suppress(OSError):  # some systems do not open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
