"""Channels that are removed for real: what must shrink together, and functions on smaller arrays.

groups = structure.find_groups(apply, variables, images)     # from the jaxpr, any framework
plan = groups.plan({"conv1/kernel:3": kept})                 # bools, one for each channel
small = plan.compact(variables)                              # smaller arrays
output = jax.jit(plan.wrap(apply))(small, images)            # the same function on them
"""

from jaxprune.structure._finding import find_groups
from jaxprune.structure._groups import Frozen, Group, Groups, Member
from jaxprune.structure._optimizer import CompactedState, compact_state
from jaxprune.structure._plans import Plan, load_plan
from jaxprune.structure._ranking import (
    count_parameters,
    filter_norms,
    fpgm,
    keep_global,
    keep_uniform,
    keep_within,
    norm_scales,
    normalized,
    taylor,
)
from jaxprune.structure._traces import Model, Trace

__all__ = [
    "CompactedState",
    "Frozen",
    "Group",
    "Groups",
    "Member",
    "Model",
    "Plan",
    "Trace",
    "compact_state",
    "count_parameters",
    "filter_norms",
    "find_groups",
    "fpgm",
    "keep_global",
    "keep_uniform",
    "keep_within",
    "load_plan",
    "norm_scales",
    "normalized",
    "taylor",
]
