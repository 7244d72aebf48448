"""Once-for-all: trains one network whose smaller parts all work, and cuts out the one that fits.

space = elastic.named("resnet20")                       # or of one's own function
"""

from jaxprune.elastic._evolution import Evolution, Evolved, evolve, find_cheapest, remember
from jaxprune.elastic._predictor import Fit, Predictor, encode, fit_predictor, kendall, spearman
from jaxprune.elastic._recalibration import make_accuracy, recalibrate
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

__all__ = [
    "Choice",
    "Decision",
    "Evolution",
    "Evolved",
    "Fit",
    "Front",
    "Measured",
    "Point",
    "Predictor",
    "canonical",
    "count",
    "describe",
    "draw",
    "draw_distinct",
    "encode",
    "evolve",
    "find_cheapest",
    "fit_predictor",
    "kendall",
    "largest",
    "make_accuracy",
    "recalibrate",
    "remember",
    "smallest",
    "spearman",
    "specialise",
    "used",
]
