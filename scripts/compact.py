"""Remove channels of trained ResNets by several scores, and train the small ones on."""

from jaxprune.experiments.studies.compaction import main

if __name__ == "__main__":
    main()
