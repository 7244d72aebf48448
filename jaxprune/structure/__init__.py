"""Channels that are removed for real: what must shrink together, and functions on smaller arrays.

groups = structure.find_groups(apply, variables, images)     # from the jaxpr, any framework
plan = groups.plan({"conv1/kernel:3": kept})                 # bools, one for each channel
small = plan.compact(variables)                              # smaller arrays
output = jax.jit(plan.wrap(apply))(small, images)            # the same function on them
"""

from jaxprune.structure._allocation import (
    count_parameters,
    keep_global,
    keep_uniform,
    keep_within,
)
from jaxprune.structure._costs import byte_cost, count_macs, mac_cost
from jaxprune.structure._finding import find_groups
from jaxprune.structure._fitting import Fit
from jaxprune.structure._groups import Frozen, Group, Groups, Member
from jaxprune.structure._nnx import FromNNX, from_nnx
from jaxprune.structure._optimizer import CompactedState, compact_state
from jaxprune.structure._plans import Plan, load_plan, plan_of
from jaxprune.structure._scores import filter_norms, fpgm, norm_scales, normalized, taylor
from jaxprune.structure._shrinking import Shrinking, Stage
from jaxprune.structure._switching import (
    Network,
    Policy,
    Switch,
    dense_network,
    masked_channels,
    pays,
    shrink,
)
from jaxprune.structure._traces import Model, Trace

__all__ = [
    "CompactedState",
    "Fit",
    "FromNNX",
    "Frozen",
    "Group",
    "Groups",
    "Member",
    "Model",
    "Network",
    "Plan",
    "Policy",
    "Shrinking",
    "Stage",
    "Switch",
    "Trace",
    "byte_cost",
    "compact_state",
    "count_macs",
    "count_parameters",
    "dense_network",
    "filter_norms",
    "find_groups",
    "fpgm",
    "from_nnx",
    "keep_global",
    "keep_uniform",
    "keep_within",
    "load_plan",
    "mac_cost",
    "masked_channels",
    "norm_scales",
    "normalized",
    "pays",
    "plan_of",
    "shrink",
    "taylor",
]
