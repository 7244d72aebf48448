"""The training step compiled for machines that are not there, and held to rules."""
