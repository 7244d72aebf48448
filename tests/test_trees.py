"""Paths are the same for every kind of tree, and an error names the argument and every leaf."""

import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

import jaxprune
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


def test_a_module_named_bias_may_hold_a_kernel():
    params = {"bias": {"kernel": jnp.zeros((2, 2))}, "my_bias": jnp.zeros((2, 2))}
    assert _chosen(params) == ["bias/kernel"]


# Leaves of a stack of 12 layers, with the two dimensions that a matrix has, and their reasons.
STACK = {
    # Flax
    "layers/Dense_0/bias": "bias",
    "layers/LayerNorm_0/scale": "named scale",
    "layers/attention/query_norm/scale": "named scale",
    "batch_stats/layers/BatchNorm_0/mean": "batch_stats",
    "layers/bn/mean": "named mean",
    "layers/bn/var": "named var",
    # Equinox
    "layers/norm1/weight": "norm",
    "layers/norm1/bias": "bias",
    "layers/layernorm/weight": "norm",
    "layers/rnn/bias_n": "bias",
    # Haiku
    "__layer_stack_no_per_layer/block/layer_norm/offset": "named offset",
    "batch_norm/~/mean_ema/hidden": "running average",
    # as others write them
    "blocks/ln_1/w": "norm",
    "blocks/attn_norm": "norm",
    "blocks/RMSNorm_0/weight": "norm",
    "blocks/gamma": "named gamma",
    "blocks/norms/0/weight": "norm",
    "blocks/layer_scale/gamma": "named gamma",
    "blocks/beta": "named beta",
    "mixer/A_log": "named A_log",
    "mixer/dt_bias": "bias",
    # no layers, but two or more dimensions all the same
    "pos_embedding": "positions",
    "encoder/posembed_input/pos_embedding": "positions",
    "position_embeddings/embedding": "positions",
    "positions": "positions",
    "positions/embedding": "positions",
    "wpe/weight": "positions",
    "relpos_bias/rel_embedding": "positions",
    "attention/relative_position_bias_table": "bias",
    "cls": "named cls",
    "cls_token": "named cls_token",
    "class_embedding": "named class_embedding",
    "mask_token": "named mask_token",
}
WEIGHTS = [
    "layers/kernel",
    "layers/query/weight",
    "layers/rnn/weight_ih",
    "layers/l/linear/w",
    "token_embedding/embedding",
    "wte/embedding",
    "embed/embeddings",
    "adaln_norm1/linear/kernel",
    "norm_proj/weight",
    "pos_proj/kernel",
    "position_mlp/weight",
    "lora_a",
    "lora_b",
    "a",
    "b",
    "w1",
    "D",
    "beta_net/kernel",
    "blocks/3",
    "weight_mean",
    "normal/kernel",
    "norm/kernel",
    "relative/kernel",
]


@pytest.mark.parametrize("path", STACK)
def test_default_rule_knows_what_is_no_weight(path):
    leaf = jax.ShapeDtypeStruct((12, 64), jnp.float32)
    assert trees.why_not_pruned(path, leaf) == STACK[path]
    assert _chosen({path: jnp.zeros((12, 64)), "w": jnp.zeros((2, 2))}) == ["w"]


@pytest.mark.parametrize("path", WEIGHTS)
def test_default_rule_takes_weights(path):
    assert trees.why_not_pruned(path, jax.ShapeDtypeStruct((12, 64), jnp.float32)) is None
    # Where `stacked` says that the first axis numbers layers, it is a vector, whatever its name.
    leaf = jax.ShapeDtypeStruct((12, 64), jnp.float32)
    assert trees.why_not_pruned(path, leaf, axes=(0,)) == "1 dimension"


def test_a_bias_is_known_by_the_weight_beside_it():
    shapes = {"w": (3, 8, 8), "b": (3, 8)}
    stack = {"linear": shapes, "gru": {"w_i": (3, 8, 24), "w_h": (3, 8, 24), "b": (3, 24)}}
    stack |= {"mlp": {"w1": (3, 8, 8), "b1": (3, 8), "W_q": (3, 8, 8), "b_q": (3, 8)}}
    params = jax.tree.map(jnp.zeros, stack, is_leaf=lambda x: isinstance(x, tuple))
    assert _chosen(params) == ["gru/w_h", "gru/w_i", "linear/w", "mlp/W_q", "mlp/w1"]
    assert trees.reasons(params)["linear/b"] == "bias"
    # Two matrices of one low-rank factor, or of a plain network, are none the other's bias.
    low_rank = {"a": jnp.zeros((8, 2)), "b": jnp.zeros((2, 8)), "w": jnp.zeros((8, 8))}
    assert _chosen(low_rank) == ["a", "b", "w"]


def test_a_state_space_layer():
    params = {"A_log": (3, 16, 4), "D": (3, 16), "dt_bias": (3, 16), "in_proj": (3, 8, 16)}
    params = {name: jnp.zeros(shape) for name, shape in params.items()}
    assert trees.reasons(params) == {
        "A_log": "named A_log",
        "D": "named D",
        "dt_bias": "bias",
        "in_proj": None,
    }


def test_default_rule_without_the_stacked_axes():
    leaf = jnp.zeros((12, 64))
    params = {"layers": {"mix": leaf, "kernel": jnp.zeros((12, 8, 8))}, "head": leaf}

    def stacked(path, leaf):
        return 0 if path.startswith("layers/") else None

    assert _chosen(params) == ["head", "layers/kernel", "layers/mix"]
    flags = trees.prunable_flags(params, stacked=stacked)
    assert flags == (True, True, False)
    experts = {"experts": jnp.zeros((12, 4, 8)), "w": jnp.zeros((2, 2))}
    assert trees.prunable_flags(experts, stacked=lambda p, x: (0, 1) if x.ndim > 2 else ()) == (
        False,
        True,
    )


def test_default_rule_on_a_whole_nnx_model():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.average = nnx.BatchStat(jnp.zeros((4, 4)))
            self.cache = nnx.Cache(jnp.zeros((4, 4)))
            self.table = nnx.Variable(jnp.zeros((4, 4)))
            self.seen = nnx.Intermediate(jnp.zeros((4, 4)))
            self.nudge = nnx.Perturbation(jnp.zeros((4, 4)))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    model = nnx.split_rngs(splits=3)(nnx.vmap(Block))(nnx.Rngs(0))
    for whole in (nnx.state(model), model):
        reasons = trees.reasons(whole)
        assert [path for path, reason in reasons.items() if reason is None] == ["linear/kernel"]
        assert _chosen(whole) == ["linear/kernel"]
        assert reasons["average"] == "nnx.BatchStat"
        assert reasons["cache"] == "nnx.Cache"
        assert reasons["table"] == "nnx.Variable"
        assert reasons["seen"] == "nnx.Intermediate"
        assert reasons["nudge"] == "nnx.Perturbation"
        assert reasons["dropout/rngs/key"] == "nnx.RngKey"
        assert reasons["norm/mean"] == "nnx.BatchStat"
    # An optimizer of NNX shows plain arrays at updates: names must lead to the same flags.
    params = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(params)
    assert trees.prunable_flags(params) == trees.prunable_flags(plain)


def test_complex_kernels_are_an_error_and_other_complex_leaves_are_not():
    params = {"fft": jnp.zeros((4, 4), jnp.complex64), "w": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match="complex kernels.*real and imaginary parts") as error:
        trees.prunable_flags(params)
    assert str(error.value).splitlines()[1:] == ["  fft: shape (4, 4), dtype complex64"]
    assert _chosen(params, lambda path, leaf: path == "w") == ["w"]
    assert _chosen({"phase": jnp.zeros(4, jnp.complex64), "w": params["w"]}) == ["w"]
    with pytest.raises(ValueError, match="fft: shape .*complex64"):
        trees.prunable_flags(params, lambda path, leaf: True)


# ---- trees that can be called


@struct.dataclass
class Callable:
    kernel: Any
    bias: Any

    def __call__(self, *arguments):
        raise AssertionError("a tree was called")


@struct.dataclass
class Above:
    size: int  # a setting, and a leaf

    def __call__(self, path, leaf):
        return leaf.size > self.size


class Static:
    def __call__(self, path, leaf):
        return leaf.size > 3


@pytest.mark.parametrize(
    "rule",
    [
        lambda path, leaf: leaf.size > 3,
        functools.partial(lambda size, path, leaf: leaf.size > size, 3),
        functools.partial(lambda size, path, leaf: leaf.size > size, np.array(3)),
        jax.tree_util.Partial(lambda size, path, leaf: leaf.size > size, jnp.array(3)),
        Above(3),
        Static(),
        jax.jit(lambda path, leaf: True),
        isinstance,
        dict,
    ],
)
def test_functions_are_rules(rule):
    assert trees.is_rule(rule)


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        {"kernel": True},
        Callable(True, False),
        Callable(np.True_, np.False_),
        Callable(jnp.ones(2), None),
        Callable(jax.ShapeDtypeStruct((2,), bool), jax.nn.relu),
        nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    ],
)
def test_trees_are_no_rules(tree):
    assert not trees.is_rule(tree)


def test_a_callable_tree_of_bools():
    params = Callable(jnp.zeros((2, 2)), jnp.zeros(2))
    for yes, no in ((True, False), (np.True_, np.False_), (jnp.array(True), jnp.array(False))):
        assert _chosen(params, Callable(yes, no)) == ["kernel"]
        assert _chosen(params, Callable(no, yes)) == ["bias"]
    assert _chosen(params, Above(3)) == ["kernel"]
    with pytest.raises(ValueError, match=r"module with arrays.*lambda(.|\n)*other: missing"):
        trees.prunable_flags({"kernel": jnp.zeros(2), "other": jnp.zeros(2)}, Callable(True, None))


# ---- leaves that are no arrays


def test_what_is_no_array_is_never_pruned_and_no_predicate_sees_it():
    params = {"kernel": jnp.zeros((2, 2)), "act": jax.nn.relu, "mode": "same", "rate": 0.5}
    assert _chosen(params) == ["kernel"]
    assert _chosen(params, lambda path, leaf: leaf.ndim > 1) == ["kernel"]
    assert _chosen(params, lambda path, leaf: True) == ["kernel"]
    assert _chosen(params, jax.tree.map(lambda _: True, params)) == ["kernel"]
    assert _chosen(params, {"kernel": True}) == ["kernel"]
    reasons = trees.reasons(params)
    none = "not an array"
    assert reasons == {"act": none, "kernel": None, "mode": none, "rate": none}
    with pytest.raises(ValueError, match=r"matches no leaf(.|\n)*act: custom_jvp"):
        trees.prunable_flags({"act": jax.nn.relu, "rate": 0.5})


def test_masks_fit_with_and_without_what_is_no_array():
    whole = {"kernel": jnp.zeros((2, 2)), "act": jax.nn.relu, "rate": 0.5}
    arrays = {"kernel": jnp.zeros((2, 2)), "act": None, "rate": None}
    masks = {"kernel": jnp.ones((2, 2), bool), "act": True, "rate": jnp.array(True)}

    def problems(masks, tree):
        return trees.unmatched(trees.places(masks), trees.places(tree))

    for some in (masks, masks | {"act": None, "rate": None}, masks | {"act": jax.nn.relu}):
        assert problems(some, whole) == problems(some, arrays) == []
    assert problems({"kernel": True}, arrays) == []
    assert problems({"kernel": True}, whole) == ["rate: no mask"]
    assert problems(masks | {"act": False}, arrays) == ["act: a mask without a leaf"]
    assert problems(masks | {"new": True}, whole) == ["new: a mask without a leaf"]
    assert problems(masks | {"kernel": jax.nn.relu}, whole) == ["kernel: no mask, but custom_jvp"]


def test_predicate_sees_path_and_leaf():
    chosen = _chosen(_params(), lambda path, leaf: leaf.ndim <= 1 and not path.startswith("t"))
    assert chosen == ["conv/bias"]
    assert _chosen({"a": jnp.zeros(())}, lambda path, leaf: True) == ["a"]


def test_spread():
    relu = jax.nn.relu
    tree = {
        "m": {"k": jnp.zeros(2), "act": relu, "none": None, "hidden": optax.MaskedNode()},
        "h": optax.MaskedNode(),
        "a": 1.0,
        "a/b": 2.0,
        "empty": {},
    }
    for scalar in (False, jnp.array(False)):
        found = trees.spread({"m": scalar}, tree)
        assert found == {"m/k": scalar, "m/act": True}
    masks = {"a": True, "h": {"x": False}, "empty": True, "m": {"k": None, "hidden": False}}
    assert trees.spread(masks, tree) == {"a": True, "m/k": None}
    assert trees.spread({"empty": {"x": True}}, tree) == {"empty/x": True}
    assert trees.spread({"hh": True, "m": np.ones(2)}, tree).keys() == {"hh", "m"}
    assert trees.spread(True, [1.0, {"k": 2.0}]) == {"0": True, "1/k": True}
    assert trees.spread(False, 3.0) == {"": False}
    slashes = {"m": optax.MaskedNode(), "m/k": 1.0}
    assert trees.spread({"m": True, "m/k": False}, slashes) == {"m/k": False}
    one = {"m": True, "m/k": False}
    assert trees.spread(one, {"m": {"j": 1.0}, "m/k": 1.0}) == {"m/j": True, "m/k": False}


def test_a_bool_for_a_whole_branch():
    params = {"a": jnp.zeros((2, 2)), "b": [jnp.zeros(3), {"c": jnp.zeros(3)}]}
    assert _chosen(params, {"a": False, "b": True}) == ["b/0", "b/1/c"]
    assert _chosen(params, {"a": True, "b": [False, True]}) == ["a", "b/1/c"]


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


class _Asked(NamedTuple):
    trees: list


def test_the_placeholder_of_optax_is_known_and_no_parameters_are():
    seen = []

    def init(params):
        seen.append(trees.is_placeholder(params))
        return _Asked([params, params])

    params = {"kernel": jnp.ones((2, 3))}
    state = init(params)
    doubled = optax.tree_map_params(init, lambda leaf: 2 * leaf, state)
    assert seen == [False, True]
    assert [float(tree["kernel"].sum()) for tree in doubled.trees] == [12, 12]
    assert trees.prunable_flags({}) == ()


# ---- names


PATH = "model/layer1/attention/kernel"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (PATH, "leaf"),
        ("kernel", "leaf"),
        ("kern*", "leaf"),
        ("attention/kernel", "leaf"),
        ("layer?/*/kernel", "leaf"),
        ("layer1", "module"),
        ("model/layer[12]", "module"),
        ("layer1/attention", "module"),
        ("layer", None),
        ("layer1/kernel", None),
        ("layer2", None),
        ("*/model", None),
        ("kernel/x", None),
    ],
)
def test_a_name_means_neighbouring_keys(name, kind):
    assert trees.means(name, PATH) == kind


def test_numbers_at_the_end_may_be_left_out():
    for name in ("kernel", "a/kernel", "kernel[3]", "a/kernel[3]"):
        assert trees.means(name, "a/kernel[3]") == "leaf"
    assert trees.means("kernel[2]", "a/kernel[3]") is None
    assert trees.means("a/kernel", "a/kernel:1") == trees.means("kernel:1", "a/kernel:1") == "leaf"


def test_a_whole_path_means_one_leaf_alone():
    found = trees.by_name("budget", {"w": 1, "b": 2}, ["w", "layer/w", "layer/b", "b2"])
    assert found == {"w": 1, "layer/b": 2}


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"layer1": 1, "layer[0-9]": 2}, 1),  # a wildcard has more characters, and says less
        ({"layer[0-9]": 2, "layer1": 1}, 1),
        ({"layer1": 1, "*/kernel": 2}, 1),
        ({"layer*": 1, "l*": 2, "*": 3}, 1),
        ({"*/kernel": 1, "*": 2}, 1),
        ({"layer1/kernel": 1, "layer1": 2}, 1),
        ({"layer1/kernel": 1, "*/kernel": 2}, 1),
        ({"layer1": 3, "kernel": 3}, 3),
    ],
)
def test_the_most_precise_name_decides(values, wanted):
    paths = ["layer1/kernel", "layer2/kernel", "layer1/bias", "layer10/kernel"]
    assert trees.by_name("budget", values, paths)["layer1/kernel"] == wanted


def test_equally_precise_names_need_one_value():
    with pytest.raises(ValueError, match="equally precise .*\n  layer1/kernel: layer1, kernel"):
        trees.by_name("budget", {"layer1": 1, "kernel": 2}, ["layer1/kernel", "layer2/kernel"])


NAMED = {
    "layer1": {"kernel": np.ones((2, 3)), "bias": np.ones(3), "norm": {"scale": np.ones((2, 2))}},
    "layer2": {"kernel": np.ones((3, 3)), "step": np.ones((2, 2), int)},
    "w": np.ones((3, 4)),
}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("kernel", ["layer1/kernel", "layer2/kernel"]),
        (["layer1"], ["layer1/kernel"]),  # of a module, what the default rule prunes
        (("layer1/bias", "w"), ["layer1/bias", "w"]),  # a leaf that is named, whatever it is
        ({"layer*"}, ["layer1/kernel", "layer2/kernel"]),
        (["layer1/*"], ["layer1/bias", "layer1/kernel"]),
        (["norm/scale", "layer2"], ["layer1/norm/scale", "layer2/kernel"]),
    ],
)
def test_prunable_takes_names(names, chosen):
    flags = trees.prunable_flags(NAMED, names)
    paths = [path for path, flag in zip(trees.leaf_by_path(NAMED), flags, strict=True) if flag]
    assert paths == chosen


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("kernl", "change these:\n  kernl: did you mean kernel?"),
        (["kernel", "layer3", "x"], "\n  layer3: did you mean layer"),
        ("layer2/step", "must select floating-point leaves with at least one element"),
        ("norm", "the default rule excludes:\n  norm: layer1/norm/scale, named scale"),
        (["layer2", "norm"], "name the leaves themselves, as in layer1/kernel; the default rule"),
    ],
)
def test_names_that_choose_nothing_are_refused(names, message):
    with pytest.raises(ValueError) as error:
        trees.prunable_flags(NAMED, names)
    assert message in str(error.value)


@pytest.mark.parametrize("nothing", [[], (), {}, set(), frozenset(), "", {"layer1": {}}])
def test_an_empty_prunable_is_refused(nothing):
    with pytest.raises(ValueError, match="`prunable` must say which leaves are pruned, but is "):
        trees.prunable_flags(NAMED, nothing)


def test_keys_that_jax_cannot_sort_are_named():
    mixed = {"a": [{1: np.ones((2, 2)), "1": np.ones((2, 2))}], "b": {"c": np.ones(2)}}
    optimizer = jaxprune.magnitude_transform(0.5, stop=3)
    calls = [
        lambda: jaxprune.prune(mixed, 0.5),
        lambda: optimizer.init(mixed),
        lambda: jaxprune.summarize(mixed),
        lambda: jaxprune.apply_masks(mixed, mixed),
    ]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == (
            "all keys of a dict in a tree must be texts, or all numbers, because JAX sorts them; "
            "rename keys of:\n  a/0: 1, '1'"
        )
    # Where they need no sorting, the two leaves have the same path.
    with pytest.raises(ValueError, match="must have different paths; rename one of each of these"):
        jaxprune.prune(OrderedDict(mixed["a"][0]), 0.5)


def test_a_module_with_a_complex_kernel_is_refused():
    with pytest.raises(ValueError, match=r"a/kernel: shape \(2, 2\), dtype complex64"):
        params = {"a": {"kernel": jnp.ones((2, 2), "complex64")}, "b": jnp.ones((2, 2))}
        trees.prunable_flags(params, ["a", "b"])


def test_names_reach_nnx_at_the_start_and_at_updates():
    model = Net(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(state)
    assert trees.prunable_flags(state, "blocks") == trees.prunable_flags(plain, "blocks")
    assert sum(trees.prunable_flags(state, ["blocks/0/kernel", "norm/scale"])) == 2


def test_a_dtype_among_the_leaves_is_no_parameter():
    """`np.float32` is a class that has a shape and a dtype, as modules may keep it."""
    tree = {"act": jax.nn.relu, "dtype": np.float32, "w": jnp.arange(6.0).reshape(2, 3)}
    pruned, masks = jaxprune.prune(tree, 0.5)
    assert int(masks["w"].sum()) == 3 and masks["dtype"] in (True, None)
    assert pruned["dtype"] is np.float32
