"""One user of a folder at a time."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl: Any = None

_NAME = ".lock"
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class Lock:
    """A folder that this process alone uses, from `locked`.

    Example:
        >>> import tempfile
        >>> with locked(tempfile.mkdtemp()) as lock:
        ...     lock.check()
    """

    def __init__(self, folder: Path, descriptor: int, name: str) -> None:
        """Keeps the open file that is locked."""
        self.folder, self.descriptor, self._name = folder, descriptor, name

    def check(self) -> None:
        """Raises a ValueError if the folder was deleted or replaced since it was locked."""
        if not is_same(self.folder / _NAME, self.descriptor):
            raise ValueError(
                f"{self._name} {self.folder} was deleted, moved or replaced while it was in use: "
                "what was written there is lost. Run the same command again."
            )


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], name: str = "`folder`") -> Iterator[Lock]:
    """Locks a folder against other processes that ask for this lock.

    The system releases the lock when the process ends, however it ends, so a lock is never stale.
    Where a file system has no locks, none is held.

    Args:
        folder: the folder, which must exist; it holds a file `.lock` as long as it is locked.
        name: what errors call it.

    Yields:
        The `Lock`.

    Raises:
        ValueError: if another process, or another part of this one, has the lock.
        OSError: if the folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with locked(folder), locked(folder):
        ...     pass
        Traceback (most recent call last):
        ValueError: `folder` ... is in use by process ... on ... since ...; wait until it ends, ...
    """
    folder = Path(folder)
    path = folder / _NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
        try:
            if try_lock(descriptor) is False:
                raise ValueError(
                    f"{name} {folder} is in use by {_holder(descriptor)}; wait until it ends, end "
                    "it, or use a different folder."
                )
            if not is_same(path, descriptor):  # its holder ended just now and took it along
                continue
            since = datetime.datetime.now().isoformat(" ", "seconds")
            text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "at": since})
            with contextlib.suppress(
                OSError
            ):  # the text is for errors only, and a disk may be full
                os.ftruncate(descriptor, 0)
                os.write(descriptor, text.encode())
            lock = Lock(folder, descriptor, name)
            try:
                yield lock
            finally:
                if is_same(path, descriptor):
                    with contextlib.suppress(OSError):
                        path.unlink()
            return
        finally:
            os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file; False if it is locked already, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_same(path: Path, descriptor: int) -> bool:
    """Tells whether a path still names an open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


def _holder(descriptor: int) -> str:
    """Describes who wrote a lock file."""
    try:
        own = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {own['process']} on {own['host']} since {own['at']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
