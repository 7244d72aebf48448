"""Prunes a trained model in one shot, from a few batches of calibration data.

`wanda` and `sparsegpt` return the pruned parameters and the masks, `(params, masks)`. They take any
function of parameters and a batch. They find the inputs of each kernel in its jaxpr, so models need
no hooks: Linen, NNX, Equinox and plain functions work alike.
"""

from jaxprune.post_training._channels import channel_scores
from jaxprune.post_training._inputs import (
    InputStatistics,
    gram,
    input_statistics,
    squared_norms,
)
from jaxprune.post_training._matrices import from_matrices, to_matrices
from jaxprune.post_training._sparsegpt import sparsegpt
from jaxprune.post_training._wanda import wanda

__all__ = [
    "InputStatistics",
    "channel_scores",
    "from_matrices",
    "gram",
    "input_statistics",
    "sparsegpt",
    "squared_norms",
    "to_matrices",
    "wanda",
]
