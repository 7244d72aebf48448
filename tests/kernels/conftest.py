"""The library is built once for the tests, in the cache of the checkout."""

import os

from tests.conftest import ROOT

os.environ.setdefault("JAXPRUNE_CACHE", str(ROOT / ".cache" / "jaxprune"))
