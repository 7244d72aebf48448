"""Pruning methods as Optax gradient transformations, one method per file."""

from jaxprune.transforms._acdc import acdc_transform
from jaxprune.transforms._agip import AgipState, agip_transform
from jaxprune.transforms._base import MaskState
from jaxprune.transforms._chain import chain
from jaxprune.transforms._fixed_mask import FixedMaskState, fixed_mask_transform
from jaxprune.transforms._magnitude import magnitude_transform
from jaxprune.transforms._packed import PackedState, pack_state
from jaxprune.transforms._random import random_transform
from jaxprune.transforms._rigl import rigl_transform
from jaxprune.transforms._room import Room, get_room, resize_state
from jaxprune.transforms._saliency import saliency_transform
from jaxprune.transforms._set import set_transform
from jaxprune.transforms._straight_through import (
    StraightThroughState,
    straight_through_transform,
)

__all__ = [
    "AgipState",
    "FixedMaskState",
    "MaskState",
    "PackedState",
    "Room",
    "StraightThroughState",
    "acdc_transform",
    "agip_transform",
    "chain",
    "fixed_mask_transform",
    "get_room",
    "magnitude_transform",
    "pack_state",
    "random_transform",
    "resize_state",
    "rigl_transform",
    "saliency_transform",
    "set_transform",
    "straight_through_transform",
]
