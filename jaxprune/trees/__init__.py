"""Leaf paths, the rule that says which leaves are pruned, and errors that name every bad leaf."""

from jaxprune.trees._branches import spread
from jaxprune.trees._defaults import reasons, why_not_pruned
from jaxprune.trees._paths import (
    check_same_structure,
    is_absent,
    is_array,
    is_numeric,
    is_placeholder,
    keeps_leaf,
    leaf_by_path,
    leaves_like,
    leaves_with_paths,
    path_string,
    pick,
    places,
    put,
    raise_for,
    shape_of,
    state_fields,
    unmatched,
)
from jaxprune.trees._rules import (
    Prunable,
    Stacked,
    is_rule,
    prunable_flags,
    stacked_axes,
)

__all__ = [
    "Prunable",
    "Stacked",
    "check_same_structure",
    "is_absent",
    "is_array",
    "is_numeric",
    "is_placeholder",
    "is_rule",
    "keeps_leaf",
    "leaf_by_path",
    "leaves_like",
    "leaves_with_paths",
    "path_string",
    "pick",
    "places",
    "prunable_flags",
    "put",
    "raise_for",
    "reasons",
    "shape_of",
    "spread",
    "stacked_axes",
    "state_fields",
    "unmatched",
    "why_not_pruned",
]
