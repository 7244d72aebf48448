"""How each primitive of JAX passes on what is known of its operands."""
