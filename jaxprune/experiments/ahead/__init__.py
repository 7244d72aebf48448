"""The training step, compiled for machines that are not there and checked against rules."""
