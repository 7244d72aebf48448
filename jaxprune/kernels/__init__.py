"""Products and convolutions on CPUs that compute kept weights only, forward and backward.

`sparse_product` and `sparse_convolution` take the dense kernel and the indices of its mask, and are
differentiable functions of both `x` and the kernel. Their C++ sources are part of the package and
are compiled once for this machine; on other devices, and where there is no compiler, the same
functions are masked dense operations.
"""

from jaxprune.kernels._operations import (
    ConvolutionIndices,
    ProductIndices,
    available,
    convolution_indices,
    pack,
    product_indices,
    sparse_convolution,
    sparse_convolution_values,
    sparse_product,
    sparse_product_values,
    unpack,
)

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
