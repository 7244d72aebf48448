"""Train MobileNets, dense and sparse, and measure them in your browser."""

from jaxprune.experiments.browser_demo import main

if __name__ == "__main__":
    main()
