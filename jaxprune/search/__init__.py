"""Searches for how much each layer keeps: AMC, and simpler searches that cost the same.

    layers = search.find_layers(apply, variables, images[:1])         # from the jaxpr
    cost = structure.mac_cost(groups, apply, variables, images[:1])
    problem = search.channels(groups, variables, layers, cost=cost, budget=0.5)
    found = search.cross_entropy(problem, evaluate, evaluations=200, seed=0)
    small = found.plan.compact(variables)

A problem (`_problems`) has one decision for each group of channels, or for each leaf: how many
units it keeps. Which ones follows from their scores. A candidate is a tuple of counts, from which
everything else follows: its cost (`_pricing`), what the budget leaves for the next decision
(`_wall`), and masks as data, so that one compiled `evaluate` serves all candidates.

A search is a generator that yields candidates and is sent their scores (`_plain`,
`_cross_entropy`, `_greedy`, `_knapsack`, `_amc`). One driver (`_runs`) evaluates them, writes each
score to a journal, and resumes a killed search by sending it the scores that the journal has.
"""

from jaxprune.search._agent import Settings
from jaxprune.search._amc import amc
from jaxprune.search._cross_entropy import cross_entropy
from jaxprune.search._found import Evaluation, Found
from jaxprune.search._greedy import greedy
from jaxprune.search._journal import Journal, open_journal, read_journal
from jaxprune.search._knapsack import knapsack
from jaxprune.search._latencies import (
    Check,
    Latencies,
    Timing,
    check_latencies,
    describe_device,
    load_latencies,
    measure_latencies,
    time_layer,
)
from jaxprune.search._layers import Layer, find_layers
from jaxprune.search._plain import random, ranking, uniform
from jaxprune.search._problems import Decision, Problem, channels
from jaxprune.search._reconstruction import find_inputs, reconstruct
from jaxprune.search._runs import accuracy, guaranteed_accuracy, run
from jaxprune.search._states import State
from jaxprune.search._wall import widest, within
from jaxprune.search._weights import weight_macs, weights

__all__ = [
    "Check",
    "Decision",
    "Evaluation",
    "Found",
    "Journal",
    "Latencies",
    "Layer",
    "Problem",
    "Settings",
    "State",
    "Timing",
    "accuracy",
    "amc",
    "channels",
    "check_latencies",
    "cross_entropy",
    "describe_device",
    "find_inputs",
    "find_layers",
    "greedy",
    "guaranteed_accuracy",
    "knapsack",
    "load_latencies",
    "measure_latencies",
    "open_journal",
    "random",
    "ranking",
    "read_journal",
    "reconstruct",
    "run",
    "time_layer",
    "uniform",
    "weight_macs",
    "weights",
    "widest",
    "within",
]
