"""jaxprune: pruning in JAX as Optax gradient transformations."""

from jaxprune import (
    at_init,
    budgets,
    masks,
    patterns,
    plans,
    post_training,
    rates,
    reports,
    schedules,
    scores,
    selection,
    stats,
    storage,
    transforms,
)
from jaxprune.masks import apply_masks, get_masks, prune, prune_in_rounds, set_masks
from jaxprune.reports import summarize
from jaxprune.transforms import (
    AgipState,
    acdc_transform,
    agip_transform,
    chain,
    fixed_mask_transform,
    magnitude_transform,
    random_transform,
    rigl_transform,
    saliency_transform,
    set_transform,
    straight_through_transform,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "AgipState",
    "acdc_transform",
    "agip_transform",
    "apply_masks",
    "at_init",
    "budgets",
    "chain",
    "fixed_mask_transform",
    "get_masks",
    "magnitude_transform",
    "masks",
    "patterns",
    "plans",
    "post_training",
    "prune",
    "prune_in_rounds",
    "random_transform",
    "rates",
    "reports",
    "rigl_transform",
    "saliency_transform",
    "schedules",
    "scores",
    "selection",
    "set_masks",
    "set_transform",
    "stats",
    "storage",
    "straight_through_transform",
    "summarize",
    "transforms",
]
