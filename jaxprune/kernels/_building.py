"""Compiles the C++ sources once for this machine, and loads them."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxprune import files

SOURCES = Path(__file__).with_name("native")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread")
NAMES = tuple(
    f"jaxprune_{kind}_{direction}"
    for kind in ("product", "convolution", "depthwise")
    for direction in ("forward", "backward", "sample", "finished")
)
_LOADING = threading.Lock()
_PATIENCE = 300.0  # seconds to wait for another process that compiles the same sources


def available() -> str | None:
    """Says whether kernels run here, and compiles them if that has not happened yet.

    The library is kept in the cache folder of the user: `$JAXPRUNE_CACHE`, or
    `$XDG_CACHE_HOME/jaxprune`, or `~/.cache/jaxprune`. Its name says which sources, compiler, flags
    and CPU it is made of, and what its bytes are; a file that does not match is built again. The
    compiler is `$CXX` if that is set, otherwise c++, g++ or clang++.

    Returns:
        None if kernels run, otherwise why not and what to do. The operations of this package are
        masked dense ones then; if the library cannot be built or loaded, the first call has warned.

    Example:
        >>> available() is None or print(available())
        True
    """
    return _loaded()[1]


def target(name: str) -> str:
    """Returns the name under which XLA knows a handler of the loaded library."""
    # Compiled programs in JAX's cache name their targets: other sources must have other names.
    return f"{name}_{_loaded()[0]}"


def _loaded() -> tuple[str, str | None]:
    """Returns the key of the library, or "" and what prevents that."""
    with _LOADING:  # `functools.cache` alone lets two threads register the same names
        return _load()


@functools.cache
def _load() -> tuple[str, str | None]:
    """Builds, loads and registers the library."""
    try:
        if not _has_cpu():
            return "", (
                "JAX has no CPU device here, and kernels run on CPUs only; add `cpu` to "
                "`JAX_PLATFORMS`"
            )
        folder = cache_folder()
        key = build_key(compiler())
        library = ctypes.CDLL(str(built(folder, key)))
        for name in NAMES:
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(f"{name}_{key[:12]}", capsule, platform="cpu")
        return key[:12], None
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        warnings.warn(f"sparse kernels are not used, dense ones are: {error}", stacklevel=2)
        return "", str(error)


def _has_cpu() -> bool:
    """Tells whether JAX has a CPU device."""
    try:
        return bool(jax.devices("cpu"))
    except RuntimeError:
        return False


def cache_folder() -> Path:
    """Makes and returns the folder of the library; nobody else may write there."""
    folder = user_cache() / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise ValueError(
            f"the cache folder {folder} must belong to you and be writable by nobody else, because "
            f"code is loaded from it; run `chmod go-w {folder}` or set JAXPRUNE_CACHE to a folder "
            "of your own"
        )
    return folder


def user_cache() -> Path:
    """Returns `$JAXPRUNE_CACHE`, or `$XDG_CACHE_HOME/jaxprune`, or `~/.cache/jaxprune`.

    Returns:
        A path; the folder may not exist.

    Example:
        >>> user_cache().is_absolute()
        True
    """
    given = os.environ.get("JAXPRUNE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(given) if given else Path(base) / "jaxprune").expanduser().absolute()


def compiler() -> str:
    """Returns the path of a C++ compiler."""
    given = os.environ.get("CXX")
    names = (given,) if given else ("c++", "g++", "clang++")
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise ValueError(
        f"there is no C++ compiler (looked for {', '.join(names)}); install one, for example with "
        "`apt install g++`, or set CXX to its path"
    )


def build_key(path: str) -> str:
    """Hashes everything that the library depends on: another key is another library.

    Args:
        path: the compiler.
    """
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = [path, version, *FLAGS, platform.machine(), _processor()]
    own = hashlib.sha256("\0".join(parts).encode())
    headers = Path(jax.ffi.include_dir())
    for source in [*sorted(SOURCES.iterdir()), *sorted(headers.rglob("*.h"))]:
        own.update(source.read_bytes())
    return own.hexdigest()[:32]


def _processor() -> str:
    """Describes the CPU, whose instructions `-march=native` uses."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("model name", "flags", "Features", "CPU part")
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    return platform.processor()


def built(folder: Path, key: str) -> Path:
    """Returns the library of a key, and compiles it if it is not there or not whole.

    Args:
        folder: where libraries are kept.
        key: from `build_key`.
    """
    found = _whole(folder, key)
    if found:
        return found
    with _turn(folder):
        return _whole(folder, key) or _compiled(folder, key)


def _whole(folder: Path, key: str) -> Path | None:
    """Returns the library of a key whose bytes are what its name says; deletes others."""
    for path in folder.glob(f"kernels-{key}-*.so"):
        if _digest(path.read_bytes()) == path.stem.rpartition("-")[2]:
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(content: bytes) -> str:
    """Returns the part of a name that says what the bytes are."""
    return hashlib.sha256(content).hexdigest()[:32]


def _compiled(folder: Path, key: str) -> Path:
    """Compiles the sources; the file appears under its name when it is complete."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        output = Path(place, "kernels.so")
        command = [compiler(), *FLAGS, f"-I{jax.ffi.include_dir()}"]
        command += [str(SOURCES / "handlers.cc"), "-o", str(output)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
        if run.returncode:
            raise RuntimeError(
                f"the C++ compiler failed on the kernels: {' '.join(command)}\n"
                f"{run.stderr[-2000:]}\nSet CXX to a compiler that knows C++17."
            )
        path = folder / f"kernels-{key}-{_digest(output.read_bytes())}.so"
        os.replace(output, path)
        return path


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Waits until no other process compiles into a folder, so that all share one library."""
    end = time.monotonic() + _PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(files.locked(folder, "the cache folder"))
                break
            except ValueError:
                if time.monotonic() > end:
                    raise
            time.sleep(0.1)
        yield
