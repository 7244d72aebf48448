"""Train one elastic network, cut out the best sub-network for each budget, and compare them."""

from jaxprune.experiments.studies.elastic import main

if __name__ == "__main__":
    main()
