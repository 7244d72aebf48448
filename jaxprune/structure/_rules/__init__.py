"""Says for each JAX primitive how the facts of its operands become those of its results."""
