"""Search how much each layer of trained networks keeps, and train the smaller networks on."""

from jaxprune.experiments.studies.search import main

if __name__ == "__main__":
    main()
