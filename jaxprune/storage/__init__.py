"""Stores masks and sparse parameters in one small file, and as sparse matrices."""

from jaxprune.storage._files import load, save
from jaxprune.storage._format import Saved
from jaxprune.storage._leaves import pack_mask, unpack_mask
from jaxprune.storage._matrices import from_bcoo, to_bcoo

__all__ = ["Saved", "from_bcoo", "load", "pack_mask", "save", "to_bcoo", "unpack_mask"]
