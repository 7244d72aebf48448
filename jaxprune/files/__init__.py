"""Files that are complete or absent, checked when they are read, and locked while they are used."""

from jaxprune.files import schemas
from jaxprune.files._arrays import read_arrays
from jaxprune.files._json import parse_json, read_json, seal, unseal
from jaxprune.files._locks import Lock, locked
from jaxprune.files._writing import appending, naming, replacing

__all__ = [
    "Lock",
    "appending",
    "locked",
    "naming",
    "parse_json",
    "read_arrays",
    "read_json",
    "replacing",
    "schemas",
    "seal",
    "unseal",
]
