"""Networks in a browser: a page that runs them with LiteRT.js and measures them there.

The training environment saves networks, that of the extra `litert` converts them, and any Python
serves the folder. The page loads everything from the server on this machine.
"""

from jaxprune.browser._chromium import visit
from jaxprune.browser._networks import convert, load, save, write_images
from jaxprune.browser._serving import Server, serve
from jaxprune.browser._timing import summary

__all__ = ["Server", "convert", "load", "save", "serve", "summary", "visit", "write_images"]
