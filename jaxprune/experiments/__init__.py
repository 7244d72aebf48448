"""The experiments behind scripts/: train, prune, rewind, compact and compare networks."""
