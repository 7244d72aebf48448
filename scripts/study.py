"""Compare pruning methods, or, with `headline`, networks that shrink while they train."""

from jaxprune.experiments.studies.methods import main

if __name__ == "__main__":
    main()
