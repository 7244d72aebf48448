"""Sparse kernels for CPUs: products and convolutions that skip masked weights.

`wrap` replaces them in any function where they pay.
"""

from jaxprune.kernels._capacities import Capacities
from jaxprune.kernels._following import Following
from jaxprune.kernels._operations import (
    ConvolutionIndices,
    ProductIndices,
    available,
    convolution_indices,
    pack,
    product_indices,
    sparse_convolution,
    sparse_product,
    unpack,
)
from jaxprune.kernels._serving import Server, serve
from jaxprune.kernels._table import Case, Ratio, Table, expected_ratio, measure_table
from jaxprune.kernels._wrapping import Wrapped, wrap

__all__ = [
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
    "convolution_indices",
    "expected_ratio",
    "measure_table",
    "pack",
    "product_indices",
    "serve",
    "sparse_convolution",
    "sparse_product",
    "unpack",
    "wrap",
]
