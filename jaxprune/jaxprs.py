"""Reads the parameters of jaxpr equations in the same way for every supported version of JAX."""

from collections.abc import Mapping
from typing import Any

__all__ = ["scan_counts"]


def scan_counts(params: Mapping[str, Any], operands: int) -> tuple[int, int]:
    """Counts the operands of a scan that are constants, and those that are carried.

    Args:
        params: the parameters of the equation.
        operands: number of operands of the equation.

    Returns:
        The two numbers; the scan runs over the rest of the operands.

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
