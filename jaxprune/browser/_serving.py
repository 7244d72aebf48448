"""A web server on this machine: the page, LiteRT.js and the networks, and nothing else."""

import contextlib
import http.server
import json
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = "@litertjs"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
# The page may load nothing from elsewhere. Isolated from other pages, it has a clock of 5
# microseconds instead of 100.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval'; "
        "style-src 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; worker-src 'self'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-store",
}
LARGEST_RESULT = 1 << 24  # bytes that the page may send
HOLD = 100.0  # seconds after which a picture is taken anyway


class Server(NamedTuple):
    """A running server.

    Example:
        >>> Server._fields
        ('url', 'results')
    """

    url: str
    results: "queue.SimpleQueue[Any]"  # what pages have sent: measurements, or `{"error": ...}`


@contextlib.contextmanager
def serve(
    folder: str | os.PathLike[str], modules: str | os.PathLike[str], port: int = 0
) -> Iterator[Server]:
    """Serves a folder of `convert` to browsers on this machine, and stops at the end of the block.

    Args:
        folder: the folder with networks.json.
        modules: the `node_modules` with `@litertjs/core` from npm.
        port: 0 takes a free one.

    Yields:
        A `Server`. `url` is the page; `url + "?rounds=200"` measures at once and sends the result.

    Raises:
        ValueError: if a folder does not hold these files.
        OSError: if the port is taken.

    Example:
        >>> with serve("no-such-folder", "node_modules"):
        ...     pass
        Traceback (most recent call last):
        ValueError: `folder` no-such-folder must hold networks.json; `convert` writes it
    """
    roots = {"data": Path(folder), "litert": Path(modules) / PACKAGE, "": Path(__file__).parent}
    if not (roots["data"] / "networks.json").exists():
        raise ValueError(f"`folder` {folder} must hold networks.json; `convert` writes it")
    if not (roots["litert"] / "core" / "wasm").is_dir():
        raise ValueError(
            f"`modules` {modules} must hold {PACKAGE}/core; install it with `npm install "
            f"{PACKAGE}/core`, as `make demo-browser` does"
        )
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    own = {"roots": roots, "results": results, "shown": threading.Event()}
    handler = type("Handler", (_Handler,), own)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_port}/", results)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers with files below the roots, and takes one kind of message."""

    roots: Mapping[str, Path]
    results: "queue.SimpleQueue[Any]"
    shown: threading.Event  # that a page with "?picture" has measured

    def do_GET(self) -> None:
        """Sends a file."""
        path = self.path.partition("?")[0].strip("/") or "page.html"
        if path == "hold":  # headless Chromium takes its picture when all of a page is there
            self.shown.wait(HOLD)
            self.send_error(404)
            return
        first, _, rest = path.partition("/")
        root, rest = (self.roots[first], rest) if first in self.roots and rest else ("", path)
        root = (self.roots[""] if root == "" else root).resolve()
        file = (root / rest).resolve()
        if file.suffix == ".py" or not file.is_relative_to(root) or not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self._answer(200, TYPES.get(file.suffix, "application/octet-stream"), content)

    def do_POST(self) -> None:
        """Takes the result of a page."""
        if self.path == "/shown":
            self.shown.set()
            self._answer(200, "text/plain", b"")
            return
        size = int(self.headers.get("Content-Length") or 0)
        if self.path != "/result" or not 0 < size <= LARGEST_RESULT:
            self.send_error(404)
            return
        try:
            result = json.loads(self.rfile.read(size))
        except ValueError:
            self.send_error(400)
            return
        self._answer(200, "text/plain", b"")
        self.results.put(result)

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        for name, value in {**HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the page was closed
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""
