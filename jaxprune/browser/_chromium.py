"""Opens a page in headless Chromium and waits for what it sends."""

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from jaxprune.browser._serving import Server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# No request of the browser itself leaves the machine either.
FLAGS = (
    "--headless=new", "--disable-gpu", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


def visit(server: Server, query: str = "", *, seconds: float = 300.0, screenshot: str = "") -> Any:
    """Opens the page of a server in headless Chromium, and returns what it measured.

    Args:
        server: from `serve`.
        query: of the address, such as "rounds=200".
        seconds: how long to wait.
        screenshot: a PNG file of the page, taken in a second visit after it has measured; "": none.

    Returns:
        The message of the page: `{"networks": [{"name": ..., "ms": [...], ...}], ...}`.

    Raises:
        FileNotFoundError: if there is no Chromium.
        TimeoutError: if the page sends nothing in time.
        RuntimeError: if the page or the browser fails.

    Example:
        >>> visit(Server("http://127.0.0.1:1/", queue.SimpleQueue()), seconds=-1)
        Traceback (most recent call last):
        ValueError: `seconds` must be positive, but is -1
    """
    if not seconds > 0:
        raise ValueError(f"`seconds` must be positive, but is {seconds}")
    program = find_chromium()
    with _browser(program, f"{server.url}?{query}") as child:
        result = _wait(server, child, seconds)
    if "error" in result:
        raise RuntimeError(f"the page failed: {result['error']}")
    if screenshot:
        with tempfile.TemporaryDirectory() as profile:
            words = [f"--screenshot={screenshot}", "--window-size=1180,940"]
            words = [program, *_flags(profile), *words, f"{server.url}?picture"]
            subprocess.run(words, capture_output=True, timeout=180)
    return result


def find_chromium() -> str:
    """Returns the path of a browser."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(
        f"Chromium was not found; tried {', '.join(NAMES)}. Install it, for example with `apt-get "
        "install chromium`."
    )


@contextlib.contextmanager
def _browser(program: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a browser with a new profile and ends it with all its processes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        child = subprocess.Popen(
            [program, *_flags(profile), url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _flags(profile: str) -> list[str]:
    """Returns the flags of the browser; its sandbox does not run as root."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return [*FLAGS, f"--user-data-dir={profile}", *(["--no-sandbox"] if root else [])]


def _wait(server: Server, child: subprocess.Popen[bytes], seconds: float) -> Any:
    """Waits for a message of the page."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(queue.Empty):
            return server.results.get(timeout=0.5)
        if child.poll() is not None:
            raise RuntimeError(f"the browser ended with code {child.returncode}")
    raise TimeoutError(f"the page sent nothing in {seconds:g} seconds")
