"""Train state, step and loop, for the experiments of this package and for your own loops.

A small data set lives on the devices and a batch is a row of indices, so a step moves a few hundred
bytes from the host. For a large data set, each process provides its part of the batch. All
randomness of a step derives from its number, so a resumed run repeats it bit for bit.
"""

from jaxprune.training._averages import average_parameters, with_averages
from jaxprune.training._loop import Hook, fit
from jaxprune.training._memory import keep_memory
from jaxprune.training._perplexity import perplexity
from jaxprune.training._statistics import find_decays, mean_beside, measure_statistics
from jaxprune.training._steps import (
    TrainState,
    create_state,
    cross_entropy,
    make_chunk_step,
    make_evaluate,
    make_train_step,
)
from jaxprune.training._teaching import distillation, hidden_distance

__all__ = [
    "Hook",
    "TrainState",
    "average_parameters",
    "create_state",
    "cross_entropy",
    "distillation",
    "find_decays",
    "fit",
    "hidden_distance",
    "keep_memory",
    "make_chunk_step",
    "make_evaluate",
    "make_train_step",
    "mean_beside",
    "measure_statistics",
    "perplexity",
    "with_averages",
]
