"""Once-for-all: trains one network whose parts all work, and cuts out the one that fits.

    space = elastic.named("resnet20")                   # what may vary; or `make_space` for others
    trained = elastic.train(space, data, steps=5000, workdir="runs/elastic")
    small = elastic.extract(space, trained.variables, choice)
    model = elastic.to_module(space, small)             # a plain network of `models`

An elastic network is the user's own function. A choice masks its parameters, so one compiled
program computes all sub-networks, and cutting one out gives smaller arrays that compute the same.
"""

from jaxprune.elastic._extracting import Extracted, extract, to_module
from jaxprune.elastic._gates import Space, make_space
from jaxprune.elastic._named import named
from jaxprune.elastic._phases import ALL, Phase, phases, sub_networks
from jaxprune.elastic._programs import Recipe
from jaxprune.elastic._sorting import consumer_norms, sort_channels
from jaxprune.elastic._space import (
    Choice,
    Decision,
    canonical,
    count,
    describe,
    draw,
    largest,
    smallest,
    used,
)
from jaxprune.elastic._training import PhaseResult, Stopped, Trained, train

__all__ = [
    "ALL",
    "Choice",
    "Decision",
    "Extracted",
    "Phase",
    "PhaseResult",
    "Recipe",
    "Space",
    "Stopped",
    "Trained",
    "canonical",
    "consumer_norms",
    "count",
    "describe",
    "draw",
    "extract",
    "largest",
    "make_space",
    "named",
    "phases",
    "smallest",
    "sort_channels",
    "sub_networks",
    "to_module",
    "train",
    "used",
]
