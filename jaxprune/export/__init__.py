"""Files for other runtimes: LiteRT on phones and in browsers.

Each target is an extra, and is imported when it is first used.
"""

from jaxprune.export._conditions import SparseReport, sparse_report
from jaxprune.export._litert import LitertReport, litert

__all__ = ["LitertReport", "SparseReport", "litert", "sparse_report"]
