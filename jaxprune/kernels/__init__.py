"""Products and convolutions that compute kept weights only, on CPUs, in time that falls with density.

`sparse_product` and `sparse_convolution` take the dense kernel and the indices of its mask, and are
differentiable functions of both `x` and the kernel. Their C++ sources are part of the package and
are compiled once for this machine; on other devices, and where there is no compiler, the same
functions are masked dense operations.
"""

from jaxprune.kernels._building import available
from jaxprune.kernels._convolutions import sparse_convolution, sparse_convolution_values
from jaxprune.kernels._indices import (
    ConvolutionIndices,
    ProductIndices,
    convolution_indices,
    pack,
    product_indices,
    unpack,
)
from jaxprune.kernels._products import sparse_product, sparse_product_values

__all__ = [
    "ConvolutionIndices",
    "ProductIndices",
    "available",
    "convolution_indices",
    "pack",
    "product_indices",
    "sparse_convolution",
    "sparse_convolution_values",
    "sparse_product",
    "sparse_product_values",
    "unpack",
]
