"""Once-for-all: trains one network whose smaller parts all work, and cuts out the one that fits.

space = elastic.named("resnet20")                       # or of one's own function
"""

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

__all__ = [
    "Choice",
    "Decision",
    "canonical",
    "count",
    "describe",
    "draw",
    "largest",
    "smallest",
    "used",
]
