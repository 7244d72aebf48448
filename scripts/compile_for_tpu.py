"""Compile the training step for TPUs or GPUs that are not there, and check it."""

from jaxprune.experiments.ahead.compile import main

if __name__ == "__main__":
    main()
