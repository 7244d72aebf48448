"""jaxprune: pruning in JAX as Optax gradient transformations."""

from jaxprune import budgets, masks, rates, reports, schedules, scores, selection, stats, transforms
from jaxprune.masks import apply_masks, get_masks, prune
from jaxprune.reports import summarize
from jaxprune.transforms import AgipState, agip_transform, chain

__version__ = "0.1.0.dev0"

__all__ = [
    "AgipState",
    "agip_transform",
    "apply_masks",
    "budgets",
    "chain",
    "get_masks",
    "masks",
    "prune",
    "rates",
    "reports",
    "schedules",
    "scores",
    "selection",
    "stats",
    "summarize",
    "transforms",
]
