"""Once-for-all: trains one network whose parts all work, and cuts out the one that fits.

    space = elastic.named("resnet20")                   # what may vary; or `make_space` for others
    trained = elastic.train(space, data, steps=5000, workdir="runs/elastic")
    front = elastic.specialise(space.decisions, evaluate, cost, budgets)  # the best choice of each
    small = elastic.extract(space, trained.variables, front.points[0].choice)
    model = elastic.to_module(space, small)             # a plain network of `models`

An elastic network is the user's own function. A choice masks its parameters, so one compiled
program computes all sub-networks, and cutting one out gives smaller arrays that compute the same.
"""

from jaxprune.elastic._costs import mac_cost, parameter_cost, plan_cost
from jaxprune.elastic._evolution import Evolution, Evolved, evolve, find_cheapest, remember
from jaxprune.elastic._extracting import Extracted, extract, to_module
from jaxprune.elastic._gates import Space, make_space
from jaxprune.elastic._named import named
from jaxprune.elastic._phases import ALL, Phase, phases, sub_networks
from jaxprune.elastic._predictor import Fit, Predictor, encode, fit_predictor, kendall, spearman
from jaxprune.elastic._programs import Recipe
from jaxprune.elastic._recalibration import make_accuracy, recalibrate
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
from jaxprune.elastic._specialising import Front, Measured, Point, draw_distinct, specialise
from jaxprune.elastic._training import PhaseResult, Stopped, Trained, train

__all__ = [
    "ALL",
    "Choice",
    "Decision",
    "Evolution",
    "Evolved",
    "Extracted",
    "Fit",
    "Front",
    "Measured",
    "Phase",
    "PhaseResult",
    "Point",
    "Predictor",
    "Recipe",
    "Space",
    "Stopped",
    "Trained",
    "canonical",
    "consumer_norms",
    "count",
    "describe",
    "draw",
    "draw_distinct",
    "encode",
    "evolve",
    "extract",
    "find_cheapest",
    "fit_predictor",
    "kendall",
    "largest",
    "mac_cost",
    "make_accuracy",
    "make_space",
    "named",
    "parameter_cost",
    "phases",
    "plan_cost",
    "recalibrate",
    "remember",
    "smallest",
    "sort_channels",
    "spearman",
    "specialise",
    "sub_networks",
    "to_module",
    "train",
    "used",
]
