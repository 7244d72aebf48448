"""Products and convolutions on CPUs that compute kept weights only, forward and backward.

`wrap` puts them into any function, where they pay; `Following` keeps up with masks that change, and
`serve` answers requests. Below it, `sparse_product` and `sparse_convolution` take the dense kernel
and the indices of its mask, and are differentiable functions of both `x` and the kernel. Their C++
sources are part of the package and are compiled once for this machine; on other devices, and where
there is no compiler, the same functions are masked dense operations.

`block_product` is for TPUs and GPUs, and for masks of whole blocks.
"""

from jaxprune.kernels._blocks import (
    BlockIndices,
    BlockOrder,
    block_indices,
    block_platforms,
    block_product,
    check_block_indices,
)
from jaxprune.kernels._capacities import Capacities
from jaxprune.kernels._following import Following
from jaxprune.kernels._operations import (
    ConvolutionIndices,
    ProductIndices,
    available,
    convolution_indices,
    depthwise_convolution,
    pack,
    product_indices,
    sparse_convolution,
    sparse_convolution_values,
    sparse_product,
    sparse_product_values,
    unpack,
)
from jaxprune.kernels._rewriting import replace_depthwise
from jaxprune.kernels._serving import Server, serve
from jaxprune.kernels._table import Case, Ratio, Table, expected_ratio, measure_table
from jaxprune.kernels._wrapping import Wrapped, wrap

__all__ = [
    "BlockIndices",
    "BlockOrder",
    "Capacities",
    "Case",
    "ConvolutionIndices",
    "Following",
    "ProductIndices",
    "Ratio",
    "Server",
    "Table",
    "Wrapped",
    "available",
    "block_indices",
    "block_platforms",
    "block_product",
    "check_block_indices",
    "convolution_indices",
    "depthwise_convolution",
    "expected_ratio",
    "measure_table",
    "pack",
    "product_indices",
    "replace_depthwise",
    "serve",
    "sparse_convolution",
    "sparse_convolution_values",
    "sparse_product",
    "sparse_product_values",
    "unpack",
    "wrap",
]
