"""Train a small network twice on real images, dense and with AGIP, and compare the two."""

from jaxprune.experiments.demo import main

if __name__ == "__main__":
    main()
