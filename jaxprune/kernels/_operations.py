"""The operations of the native core in one place, for the modules that are built on them."""

from jaxprune.kernels._building import available
from jaxprune.kernels._convolutions import (
    finished_convolution,
    sparse_convolution,
    sparse_convolution_values,
)
from jaxprune.kernels._depthwise import depthwise_convolution, finished_depthwise
from jaxprune.kernels._indices import (
    ConvolutionIndices,
    ProductIndices,
    convolution_indices,
    pack,
    product_indices,
    unpack,
)
from jaxprune.kernels._products import finished_product, sparse_product, sparse_product_values

__all__ = [
    "ConvolutionIndices",
    "ProductIndices",
    "available",
    "convolution_indices",
    "depthwise_convolution",
    "finished_convolution",
    "finished_depthwise",
    "finished_product",
    "pack",
    "product_indices",
    "sparse_convolution",
    "sparse_convolution_values",
    "sparse_product",
    "sparse_product_values",
    "unpack",
]
