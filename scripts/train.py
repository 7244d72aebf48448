"""Train a ResNet and prune it while it learns; see `--help`."""

from jaxprune.experiments.train import main

if __name__ == "__main__":
    main()
