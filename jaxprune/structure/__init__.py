"""Removes channels for real: finds what shrinks together and runs functions on smaller arrays.

groups = structure.find_groups(apply, variables, images)     # from the jaxpr, any framework
plan = groups.plan({"conv1/kernel:3": kept})                 # bools, one for each channel
small = plan.compact(variables)                              # smaller arrays
output = jax.jit(plan.wrap(apply))(small, images)            # the same function on them

Why: zeros save no time on dense hardware; smaller arrays do. Removing a channel shrinks the kernel
that produces it, the norm layer behind it and every kernel that reads it, and a residual connection
ties several layers together. Finding these ties by hand is where channel pruning goes wrong.

What is unusual: nothing here knows layers or frameworks. A function is traced once to a jaxpr, and
each index of each dimension of each array gets a node in a union-find (`_nodes`). A rule for each
primitive (`_rules`) joins the nodes that must be removed together and notes what is known of
removed entries, such as that they are 0 (`_values`). A primitive without a rule freezes what it
touches, so an unknown operation costs freedom and never correctness. The smaller function is the
same jaxpr, run on smaller arrays (`_execution`); no user code changes.

Whole layers go in the same way. A plan may keep nothing of a leaf, and `_zeros` follows what is 0
without it, so that nothing of a branch is computed; `_branches` and `_blocks` find the branches.

What to read first: `_values` (the facts), `_rules/elementwise` and `_rules/products` (rules),
`_analysis` (one pass over a function), `_joining` (passes -> groups), `_plans` (what users hold).
The rest stands on these: `_scores`, `_block_scores` and `_allocation` choose, `_costs` counts,
`_optimizer` slices optimizer states, `_unstacking` makes lists of stacked layers, and `_shrinking`
removes or adds channels while a network trains.
"""

from jaxprune.structure._allocation import (
    count_parameters,
    keep_global,
    keep_uniform,
    keep_within,
)
from jaxprune.structure._block_scores import block_influence, block_losses, block_taylor
from jaxprune.structure._costs import byte_cost, cache_cost, count_macs, latency_cost, mac_cost
from jaxprune.structure._finding import find_groups
from jaxprune.structure._fitting import Fit
from jaxprune.structure._groups import Frozen, Group, Groups, Member
from jaxprune.structure._growing import expand, expand_state
from jaxprune.structure._nnx import FromNNX, from_nnx
from jaxprune.structure._optimizer import CompactedState, compact_state
from jaxprune.structure._plan_files import load_plan, plan_of
from jaxprune.structure._plans import Plan
from jaxprune.structure._scores import filter_norms, fpgm, norm_scales, normalized, taylor
from jaxprune.structure._shrinking import Shrinking, Stage
from jaxprune.structure._switching import (
    Growth,
    Network,
    Policy,
    Switch,
    dense_network,
    grow,
    masked_channels,
    pays,
    shrink,
)
from jaxprune.structure._traces import Model, Trace
from jaxprune.structure._unstacking import Unstacked, unstack

__all__ = [
    "CompactedState",
    "Fit",
    "FromNNX",
    "Frozen",
    "Group",
    "Groups",
    "Growth",
    "Member",
    "Model",
    "Network",
    "Plan",
    "Policy",
    "Shrinking",
    "Stage",
    "Switch",
    "Trace",
    "Unstacked",
    "block_influence",
    "block_losses",
    "block_taylor",
    "byte_cost",
    "cache_cost",
    "compact_state",
    "count_macs",
    "count_parameters",
    "dense_network",
    "expand",
    "expand_state",
    "filter_norms",
    "find_groups",
    "fpgm",
    "from_nnx",
    "grow",
    "keep_global",
    "keep_uniform",
    "keep_within",
    "latency_cost",
    "load_plan",
    "mac_cost",
    "masked_channels",
    "norm_scales",
    "normalized",
    "pays",
    "plan_of",
    "shrink",
    "taylor",
    "unstack",
]
