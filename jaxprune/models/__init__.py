"""Residual networks in Flax NNX whose widths are data, block by block."""

from jaxprune.models.resnet import (
    ResNet,
    Widths,
    default_widths,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
)
from jaxprune.models.widths import widths_of

__all__ = [
    "ResNet",
    "Widths",
    "default_widths",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "widths_of",
]
