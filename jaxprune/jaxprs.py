"""What a jaxpr says of its operations, the same for every version of JAX that is supported."""

from collections.abc import Mapping
from typing import Any

__all__ = ["scan_counts"]


def scan_counts(params: Mapping[str, Any], operands: int) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    Args:
        params: of the equation.
        operands: how many it has.

    Returns:
        The two numbers; the other operands are what the scan runs over.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def total(x, rows):
        ...     return jax.lax.scan(lambda c, row: (c + row * x, None), jnp.float32(0), rows)
        >>> (scan,) = jax.make_jaxpr(total)(1.0, jnp.ones(3)).eqns[-1:]
        >>> scan_counts(scan.params, len(scan.invars))
        (1, 1)
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].update(range(operands)).unpack()  # JAX 0.12
    return len(consts), len(carry)
