"""Opens pages in headless Chromium, which are not allowed to ask any other machine for anything."""

import functools
import http.server
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxprune.browser._chromium import find_chromium

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
# The browser refuses whatever a page wants from elsewhere, and says so on the console. A proxy
# would also see what Chromium itself asks its maker for.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"


class Page(NamedTuple):
    """A page after its scripts have run."""

    html: str
    console: list[str]  # errors and messages, among them each request for another machine


class _Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_message(self, format, *args):
        pass


def program() -> str:
    """The path of Chromium; where it is missing, the test is skipped."""
    try:
        return find_chromium()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serves a folder on this machine while the block runs; gives its address."""
    handler = functools.partial(_Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def load(url: str, *arguments: str, patience: int = 20_000) -> Page:
    """Opens a page and closes the browser when its scripts are idle.

    `patience` is virtual time in milliseconds: it passes at once while nothing happens, and stands
    still while requests are under way. 0 is real time, for pages that measure it.
    """
    budget = [f"--virtual-time-budget={patience}"] if patience else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [program(), *OPTIONS, f"--user-data-dir={profile}", *budget, "--dump-dom"]
            + [*arguments, url],
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    return Page(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def screenshot(url: str, path: Path, size: tuple[int, int] = (1400, 1000)) -> None:
    """Writes a picture of a page, as a PNG."""
    load(url, f"--screenshot={path}", f"--window-size={size[0]},{size[1]}")
