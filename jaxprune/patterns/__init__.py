"""Patterns of weights that are pruned together: N of every M in a row, blocks, whole channels.

A pattern describes a leaf. Blocks and channels divide it into units: the scores of a unit are
pooled, units are selected like single weights (`selection`), and the mask of the units is expanded
to the weights. With N:M, the weights of every group of M are selected separately. All arrays keep
the number of dimensions of the leaf, so sharded leaves stay on their devices.
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
    check_pattern,
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
    "check_pattern",
    "copy_shape",
    "expand",
    "n_m",
    "n_m_mask",
    "patterns_of",
    "pool",
    "unit_shape",
]
