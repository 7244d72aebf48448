"""Prune a ResNet in rounds and train it again, in several ways, and compare them."""

from jaxprune.experiments.studies.rewinding import main

if __name__ == "__main__":
    main()
