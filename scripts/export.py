"""Write a trained run as files for phones, browsers and servers."""

from jaxprune.experiments.export import main

if __name__ == "__main__":
    main()
