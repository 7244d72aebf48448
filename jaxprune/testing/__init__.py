"""Assertions about masks, and the contract of a pruning transformation, for tests of your own.

testing.assert_masked(params, masks)              # masked weights are exactly 0
testing.assert_sparsity(masks, 0.9)               # and as many as they should be
step = jax.jit(testing.traced_once(step))         # compiled once, or the error says what changed
testing.check_transform(my_transform)             # all laws that the library's own methods keep

`_asserts` has one function for each statement; every error names the leaves, what is wrong with
them and where it is first seen. `_contract` makes a small training of a transformation, and checks
one law after another. Nothing here needs pytest or chex, and everything works with both.
"""

from jaxprune.testing._asserts import (
    assert_masked,
    assert_nested,
    assert_same_masks,
    assert_sparsity,
    traced_once,
)
from jaxprune.testing._contract import LAWS, Example, check_transform

__all__ = [
    "LAWS",
    "Example",
    "assert_masked",
    "assert_nested",
    "assert_same_masks",
    "assert_sparsity",
    "check_transform",
    "traced_once",
]
