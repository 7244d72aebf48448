"""Which weights fall together: N of every M in a row, blocks, whole channels.

A pattern describes a leaf. Blocks and channels cut it into units: the scores of a unit are
pooled, units are selected like single weights (`selection`), and the mask of the units is
spread over the weights. With N:M every group of M weights is a selection of its own.
Everything keeps the number of dimensions, so sharded leaves stay where they are.
"""

from jaxprune.patterns._kinds import (
    NM,
    Blocks,
    Channels,
    Pattern,
    PatternRule,
    axis_of,
    blocks,
    channels,
    copy_shape,
    n_m,
    patterns_of,
    unit_shape,
)
from jaxprune.patterns._n_m import n_m_mask
from jaxprune.patterns._units import any_kept, expand, pool

__all__ = [
    "NM",
    "Blocks",
    "Channels",
    "Pattern",
    "PatternRule",
    "any_kept",
    "axis_of",
    "blocks",
    "channels",
    "copy_shape",
    "expand",
    "n_m",
    "n_m_mask",
    "patterns_of",
    "pool",
    "unit_shape",
]
