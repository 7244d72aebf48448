"""Pruning methods as Optax gradient transformations, one method per file."""

from jaxprune.transforms._agip import AgipState, agip_transform
from jaxprune.transforms._chain import chain

__all__ = ["AgipState", "agip_transform", "chain"]
