"""Paths are the same for every kind of tree, and an error names the argument and every leaf."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxprune import trees


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)


def _paths(tree):
    return [path for path, _ in trees.leaves_with_paths(tree)]


# ---- paths


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"b": {"kernel": 1}, "a": [2, 3]}, ["a/0", "a/1", "b/kernel"]),
        ([1, (2, 3)], ["0", "1/0", "1/1"]),
        ({"x": Layer(1, 2)}, ["x/kernel", "x/bias"]),
        ({"value": 1, "x": {"value": 2}}, ["value", "x/value"]),
        ({}, []),
        ({"a": None}, []),
        (3.0, [""]),
    ],
)
def test_paths(tree, paths):
    assert _paths(tree) == paths


def test_paths_of_nnx_state_are_the_same_with_and_without_value():
    seen = []

    def init(params):
        seen.append((jax.tree_util.tree_leaves_with_path(params), _paths(params)))
        return optax.EmptyState()

    def update(updates, state, params=None):
        seen.append((jax.tree_util.tree_leaves_with_path(updates), _paths(updates)))
        return updates, state

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.GradientTransformation(init, update), wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    wanted = ["blocks/0/bias", "blocks/0/kernel", "norm/bias", "norm/scale"]
    assert [paths for _, paths in seen] == [wanted, wanted]
    assert _paths(nnx.state(model, nnx.Param)) == wanted


def test_leaves_like_takes_the_order_of_the_parameters():
    assert trees.leaves_like({"c": 0, "a": 0}, {"a": 1, "b": 2, "c": 3}) == [1, 3]
    assert trees.leaves_like({"a": 0, "d": 0}, {"a": 1}) is None
    assert trees.leaves_like({"a": 0}, None) is None
    assert trees.leaves_like({}, {"a": 1}) == []


# ---- errors


def test_raise_for_lists_everything_once():
    trees.raise_for([], "fine")
    with pytest.raises(ValueError) as error:
        trees.raise_for(["a: bad", "b: worse"], "rule:")
    assert str(error.value) == "rule:\n  a: bad\n  b: worse"


def test_check_same_structure_accepts_other_containers_with_the_same_paths():
    params = {"a": jnp.zeros((2, 3)), "b": [jnp.zeros(4)]}
    trees.check_same_structure("updates", {"a": np.zeros((2, 3)), "b": (np.zeros(4),)}, params)


def test_check_same_structure_names_every_leaf():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": jnp.zeros(())}
    with pytest.raises(ValueError) as error:
        trees.check_same_structure("updates", {"a": jnp.zeros((3, 2)), "c": 0.0, "d": 1.0}, params)
    assert str(error.value).splitlines() == [
        "`updates` must have the paths and shapes of the parameters:",
        "  b: missing",
        "  d: not a parameter",
        "  a: shape (3, 2), but the parameter has (2, 3)",
    ]


# ---- which leaves are pruned


def _params():
    return {
        "conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
        "count": jnp.zeros((2, 2), jnp.int32),
        "embedding": jnp.zeros((5, 2), jnp.bfloat16),
        "empty": jnp.zeros((0, 2)),
        "stacked": {"bias": jnp.zeros((6, 4)), "scale": jnp.zeros((6, 4))},
        "temperature": jnp.zeros(()),
    }


def _chosen(params, prunable=None):
    flags = trees.prunable_flags(params, prunable)
    assert all(type(flag) is bool for flag in flags)
    return [path for path, flag in zip(_paths(params), flags, strict=True) if flag]


def test_default_rule():
    assert _chosen(_params()) == ["conv/kernel", "embedding"]


def test_default_rule_on_nnx():
    assert _chosen(nnx.state(Net(nnx.Rngs(0)), nnx.Param)) == ["blocks/0/kernel"]


def test_default_rule_reads_the_last_key_only():
    params = {"bias": {"kernel": jnp.zeros((2, 2))}, "my_bias": jnp.zeros((2, 2))}
    assert _chosen(params) == ["bias/kernel", "my_bias"]


def test_predicate_sees_path_and_leaf():
    chosen = _chosen(_params(), lambda path, leaf: leaf.ndim <= 1 and not path.startswith("t"))
    assert chosen == ["conv/bias"]
    assert _chosen({"a": jnp.zeros(())}, lambda path, leaf: True) == ["a"]


def test_tree_of_bools():
    params = {"a": jnp.zeros((2, 2)), "b": [jnp.zeros(3)]}
    assert _chosen(params, {"a": False, "b": (True,)}) == ["b/0"]
    assert _chosen(params, {"a": np.True_, "b": [np.False_]}) == ["a"]


@pytest.mark.parametrize("prunable", [None, {}, lambda path, leaf: True])
def test_empty_tree_has_no_flags(prunable):
    assert trees.prunable_flags({}, prunable) == ()


def test_tree_of_bools_lists_missing_and_extra_leaves():
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 2))}
    with pytest.raises(ValueError) as error:
        trees.prunable_flags(params, {"b": True, "c": True})
    assert str(error.value).splitlines() == [
        "`prunable` as a tree must have the leaves of the parameters:",
        "  a: missing in `prunable`",
        "  c: not a parameter",
    ]


def test_a_rule_that_matches_nothing_is_an_error():
    params = {f"x{i}": jnp.zeros(i + 1) for i in range(9)}
    with pytest.raises(ValueError, match="`prunable` matches no leaf") as error:
        trees.prunable_flags(params)
    lines = str(error.value).splitlines()[1:]
    assert lines == [f"  x{i}: shape ({i + 1},)" for i in range(8)]


def test_integer_and_empty_leaves_cannot_be_selected():
    with pytest.raises(ValueError, match="`prunable` must select floating-point") as error:
        trees.prunable_flags(_params(), lambda path, leaf: True)
    assert str(error.value).splitlines()[1:] == [
        "  count: shape (2, 2), dtype int32",
        "  empty: shape (0, 2), dtype float32",
    ]
