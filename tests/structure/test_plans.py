"""What can be asked of groups and plans beyond removing channels of a plain network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import models, structure
from jaxprune.structure import Trace
from tests.support.checks import draw, halves

# ---- one dimension that stands for several: queries, keys and values of all heads in one kernel

HEADS, WIDTH = 4, 6
LAYOUTS = {"3hd": (3, HEADS, WIDTH), "h3d": (HEADS, 3, WIDTH), "hd3": (HEADS, WIDTH, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_of_a_fused_kernel(layout):
    weights = {
        "in": draw(5, 10),
        "qkv": draw(10, 3 * HEADS * WIDTH),
        "out": draw(HEADS * WIDTH, 10),
        "head": draw(10, 3),
    }

    def attend(w, x):
        hidden = x @ w["in"]
        fused = (hidden @ w["qkv"] / 9).reshape(*x.shape[:2], *LAYOUTS[layout])
        q, k, v = jnp.moveaxis(fused, layout.index("3") + 2, 0)
        scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        mixed = jnp.einsum("bhts,bshd->bthd", scores, v).reshape(*x.shape[:2], -1)
        return (hidden + mixed @ w["out"]) @ w["head"]

    x = draw(2, 7, 5)
    groups = structure.find_groups(attend, weights, x)
    assert [(g.name, g.size) for g in groups.values()] == [("in:1", 10), ("qkv:1", HEADS)]
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.shape("qkv") == (5, 3 * 2 * WIDTH) and plan.shape("out") == (2 * WIDTH, 5)
    assert plan.verify(attend, weights, x) < 1e-5
    assert plan.verify(attend, weights, draw(3, 9, 5)) < 1e-5


def test_the_factor_that_may_shrink_survives_a_file(tmp_path):
    def function(w, x):
        q, k = jnp.moveaxis((x @ w["a"]).reshape(-1, 2, 8), 1, 0)
        return (q * k) @ w["b"]

    weights, x = {"a": draw(5, 16), "b": draw(8, 3)}, draw(4, 5)
    groups = structure.find_groups(function, weights, x)
    assert [(g.name, g.size) for g in groups.values()] == [("a:1", 8)]
    groups.plan(halves(groups), multiple=1).save(tmp_path / "plan.json")
    assert structure.load_plan(tmp_path / "plan.json").verify(function, weights, x) < 1e-5


# ---- caches


def decode(w, token, place):
    keys = w["cache"]["keys"].at[:, place].set(token @ w["key"])
    scores = jax.nn.softmax(jnp.einsum("bd,btd->bt", token @ w["query"], keys))
    return jnp.einsum("bt,btd->bd", scores, keys) @ w["out"], {"cache": {"keys": keys}}


CACHED = {
    "key": draw(5, 8),
    "query": draw(5, 8, seed=1),
    "out": draw(8, 5),
    "cache": {"keys": jnp.zeros((2, 4, 8))},
}


def test_a_cache_shrinks_and_stays_zero_where_it_is_masked():
    trace = Trace(decode, (draw(2, 5), jnp.int32(2)), lambda output: output[1])
    groups = structure.find_groups([trace], CACHED)
    assert groups.model.caches == {"cache/keys"}
    assert [(g.size, g.exact) for g in groups.values()] == [(8, True)]
    plan = groups.plan(halves(groups), multiple=1)
    step, small_step = jax.jit(decode), jax.jit(plan.wrap(decode))
    dense, small = plan.mask(CACHED), plan.compact(CACHED)
    for place in range(4):
        token = draw(2, 5, seed=place)
        out, new = step(dense, token, place)
        small_out, small_new = small_step(small, token, place)
        np.testing.assert_allclose(small_out, out, rtol=1e-5, atol=1e-5)
        dense, small = dense | new, small | small_new
    assert small["cache"]["keys"].shape == (2, 4, 4)


def test_a_cache_that_does_not_stay_zero_makes_its_group_inexact():
    def shifted(w, token, place):
        output, new = decode(w, token, place)
        return output, jax.tree.map(lambda keys: keys + 1, new)

    trace = Trace(shifted, (draw(2, 5), jnp.int32(2)), lambda output: output[1])
    groups = structure.find_groups([trace], CACHED)
    assert groups.model.caches == frozenset()
    assert [group.exact for group in groups.values()] == [False]


# ---- outputs that may shrink


def features(w, x):
    hidden = x @ w["a"]
    return {"logits": hidden @ w["b"], "features": jax.nn.sigmoid(hidden)}


def test_features_for_another_network_may_have_fewer_channels():
    weights, x = {"a": draw(5, 8), "b": draw(8, 3)}, draw(2, 5)

    def shrinks(output):
        return output["features"]

    assert not structure.find_groups(features, weights, x)
    groups = structure.find_groups([Trace(features, (x,), shrinks=shrinks)], weights)
    plan = groups.plan(halves(groups), multiple=1)
    assert plan.verify(features, weights, x, shrinks=shrinks) < 1e-6
    with pytest.raises(ValueError, match="outputs must have the shapes"):
        plan.verify(features, weights, x)
    kept = plan.kept_outputs(features, weights, x)
    assert [own.sum() for own in kept["features"]] == [2, 4]
    assert [own.sum() for own in kept["logits"]] == [2, 3]
    np.testing.assert_array_equal(kept["features"][1], plan.kept["a"][1])


# ---- loops of unknown length, which have no gradient


def looping(w, x):
    def goes_on(carry):
        return (carry[1].sum() + carry[0] * 1e3) < 3e3

    def body(carry):
        return carry[0] + 1, jax.nn.relu(carry[1] @ w["again"])

    return jax.lax.while_loop(goes_on, body, (0, x @ w["a"]))[1] @ w["b"]


def test_a_width_goes_through_a_while_loop():
    weights, x = {"a": draw(5, 8), "again": draw(8, 8) / 8, "b": draw(8, 3)}, draw(2, 5)
    groups = structure.find_groups(looping, weights, x)
    assert [(g.name, g.size) for g in groups.values()] == [("a:1", 8)]
    assert groups.plan(halves(groups), multiple=1).verify(looping, weights, x) < 1e-5


def test_a_loop_that_does_not_keep_zeros_freezes_what_it_sums():
    def shifted(w, x):
        hidden = jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h + 1, x @ w["a"])
        return hidden @ w["b"]

    weights = {"a": draw(5, 8), "b": draw(8, 3)}
    groups = structure.find_groups(shifted, weights, draw(2, 5))
    assert not groups and "`reduce_sum` over it" in str(groups)


# ---- what models do beside their channels


def normalized(h):
    return h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-3)


TABLE = np.sin(np.arange(48.0).reshape(6, 8)).astype(np.float32)

BESIDE = {
    "positions that are no parameters": (lambda w, x: x @ w["a"] + TABLE[None], (5, 8)),
    "sines of places": (
        lambda w, x: (
            x @ w["a"]
            + jnp.sin(jnp.arange(9.0)[:6, None, None] * jnp.arange(8.0)[None, None])[None, :, 0]
            * x.mean()
        ),
        (5, 8),
    ),
    "dropout before a norm": (
        lambda w, x: x @ w["a"] + jax.random.bernoulli(jax.random.key(1), 0.5, (2, 6, 8)),
        (5, 8),
    ),
    "positions, softmax": (
        lambda w, x: jax.nn.softmax(x @ w["a"] * TABLE[None] + TABLE[:1][None]),
        (5, 8),
    ),
    "look-up": (lambda w, x: jnp.take(w["a"], jnp.array([[3, 1], [0, 4]]), axis=0), (5, 8)),
    "long convolution": (
        lambda w, x: jnp.fft.irfft(jnp.fft.rfft(x @ w["a"], 16, axis=1), 16, axis=1)[:, :6],
        (5, 8),
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_width_is_free_beside(name):
    operation, shape = BESIDE[name]
    weights, x = {"a": draw(*shape), "b": draw(8, 3)}, draw(2, 6, 5)

    def net(w, x):
        return normalized(operation(w, x)) @ w["b"]

    groups = structure.find_groups(net, weights, x)
    assert [(g.name, g.size) for g in groups.values()] == [("a:1", 8)]
    assert groups.plan(halves(groups), multiple=1).verify(net, weights, x) < 1e-5


# ---- why something stays


def test_every_dimension_is_in_a_group_or_has_a_reason():
    weights = {"a": draw(5, 8), "b": draw(8, 3), "c": draw(8), "unused": draw(4, 4), "one": draw(8)}

    def function(w, x):
        hidden = jnp.cumsum(jnp.ones(8))[None] * (x @ w["a"]) + w["c"][None]
        return hidden @ w["b"] + jnp.sum(w["one"])

    found = structure.find_groups(function, weights, draw(2, 5))
    reasons = {(own.path, own.dimension): own.reason for own in found.frozen}
    assert "`dot_general` at" in reasons["a", 0] and "joins it to a fixed width" in reasons["a", 0]
    assert "`mul` at" in reasons["a", 1] and reasons["b", 1] == "an output has it"
    assert "`add` at" in reasons["c", 0]
    assert reasons["unused", 0] == reasons["unused", 1] == "no traced function uses it"
    assert found["one:0"].size == 8  # a sum of parameters: each can go
    assert ("unused", 1) not in {(m.path, m.dimension) for g in found.values() for m in g.members}


def test_places_that_no_traced_length_reaches_stay():
    weights = {"positions": draw(10, 5), "out": draw(5, 3)}

    def net(w, x):
        return (x + w["positions"][None, : x.shape[1]]) @ w["out"]

    groups = structure.find_groups(net, weights, draw(2, 4, 5))
    assert not groups and groups.plan({}).verify(net, weights, draw(2, 7, 5)) == 0
    assert ("positions", 0) in {(own.path, own.dimension) for own in groups.frozen}


def test_what_another_trace_freezes_says_why():
    weights = {"a": draw(5, 8), "b": draw(8, 3)}
    traces = [
        Trace(lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"], (draw(2, 5),)),
        Trace(lambda w, x: jnp.sort(x @ w["a"]), (draw(2, 5),)),
    ]
    groups = structure.find_groups(traces, weights)
    reasons = {(own.path, own.dimension): own.reason for own in groups.frozen}
    assert not groups and "`sort` along it" in reasons["b", 0]


# ---- gates


def relu_net(w, x):
    return jax.nn.relu(x @ w["a"] + w["bias"][None]) @ w["b"]


def normed_net(w, x):
    hidden = x @ w["a"] + w["bias"][None]
    hidden = (hidden - hidden.mean(0, keepdims=True)) / (hidden.std(0, keepdims=True) + 1e-3)
    return jax.nn.relu(hidden * w["scale"][None] + w["shift"][None]) @ w["b"]


def sigmoid_net(w, x):
    return jax.nn.sigmoid(x @ w["a"] + w["bias"][None]) @ w["b"]


NETS = {
    relu_net: {"a", "bias"},  # what makes the channel
    normed_net: {"scale", "shift"},  # vectors are enough, and not all of them are needed
    sigmoid_net: {"a", "bias", "b"},  # sigmoid(0) is not 0
}


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_zeroing_the_gates_is_enough(net):
    weights = {"a": draw(5, 8), "b": draw(8, 3)}
    weights |= {name: draw(8, seed=i) for i, name in enumerate(("bias", "scale", "shift"))}
    weights = {name: own for name, own in weights.items() if name in NETS[net] | {"a", "b", "bias"}}
    x = draw(7, 5)
    groups = structure.find_groups(net, weights, x)
    (group,) = groups.values()
    assert {member.path for member in group.gates} == NETS[net]
    plan = groups.plan(halves(groups), multiple=1)
    gated = dict(weights)
    for path, dimension, channels, _ in group.gates:
        stays = np.expand_dims(plan.channels(group)[channels], 1 - dimension)
        gated[path] = gated[path] * (stays if gated[path].ndim > 1 else stays.ravel())
    np.testing.assert_allclose(
        plan.wrap(net)(plan.compact(weights), x), net(gated, x), rtol=1e-4, atol=1e-4
    )


def test_the_gates_of_a_resnet_are_its_norms():
    model = models.resnet8(num_classes=10, in_channels=1, rngs=nnx.Rngs(0))
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    variables = dict(zip(("params", "state"), map(nnx.to_pure_dict, states)))

    def train(variables, images):
        own = nnx.merge(graphdef, variables["params"], variables["state"])
        logits = own(images)
        return logits, {"state": nnx.to_pure_dict(nnx.state(own, nnx.Not(nnx.Param)))}

    images = draw(2, 8, 8, 1)
    groups = structure.find_groups([Trace(train, (images,), lambda out: out[1])], variables)
    for group in groups.values():
        kinds = {member.path.rpartition("/")[2] for member in group.gates}
        assert kinds == {"scale", "bias"}, group


# ---- plans of plans


def test_leaves_are_found_by_their_paths():
    """Keys that are numbers and keys that are text sort in different orders."""
    layers = {number: draw(5, 5, seed=number) / 3 for number in range(12)}

    def net(w, x):
        for number in range(12):
            x = jnp.tanh(x @ (w[number] if number in w else w[str(number)]))
        return x

    groups = structure.find_groups(net, layers, draw(2, 5))
    plan = groups.plan(halves(groups), multiple=1)
    small = plan.compact(layers)
    text = {str(number): leaf for number, leaf in small.items()}
    assert list(text) != sorted(text)
    x = draw(2, 5)
    np.testing.assert_array_equal(plan.wrap(net)(text, x), plan.wrap(net)(small, x))


def test_a_plan_whose_keys_were_sorted_is_the_same():
    """As `json.dumps(..., sort_keys=True)` does, and a trip through a JAX transformation."""
    layers = {number: draw(5, 5, seed=number) / 3 for number in range(12)}

    def net(w, x):
        for number in range(12):
            x = jax.nn.relu(x @ w[number])
        return x

    groups, x = structure.find_groups(net, layers, draw(2, 5)), draw(2, 5)
    plan = groups.plan(halves(groups), multiple=1)
    text = json.dumps(plan.to_dict(), sort_keys=True)
    found = structure.plan_of(json.loads(text))
    assert list(found.kept) == list(plan.kept) and found.model == plan.model
    small = plan.compact(layers)
    np.testing.assert_array_equal(found.wrap(net)(small, x), plan.wrap(net)(small, x))
    shuffled = plan._replace(kept={path: plan.kept[path] for path in sorted(plan.kept)})
    np.testing.assert_array_equal(shuffled.wrap(net)(small, x), plan.wrap(net)(small, x))


@pytest.mark.slow
def test_each_group_loses_its_own_channels_in_the_optimizer_state():
    """The name of one group is the end of the other one's, and both have six channels."""
    params = {"kernel": draw(3, 6), "a": {"kernel": draw(6, 6)}, "z": draw(6, 2)}

    def net(w, x):
        return jax.nn.relu(jax.nn.relu(x @ w["kernel"]) @ w["a"]["kernel"]) @ w["z"]

    groups = structure.find_groups(net, params, draw(2, 3))
    assert list(groups) == ["kernel:1", "a/kernel:1"]
    first = np.arange(6) < 3
    plan = groups.plan({"kernel:1": first, "a/kernel:1": ~first}, multiple=1)

    def agip(groups):
        return jaxprune.agip_transform(0.5, stop=0, groups=groups)

    averages = {"kernel:1": jnp.arange(6.0), "a/kernel:1": 10 + jnp.arange(6.0)}
    state = agip(groups).init(params)._replace(channel_average=averages)
    done = structure.compact_state(plan, agip(groups.compact(plan)), state, params, groups=groups)
    left = {name: own.tolist() for name, own in done.state.channel_average.items()}
    assert left == {"kernel:1": [0, 1, 2], "a/kernel:1": [13, 14, 15]}


def test_groups_of_what_a_plan_leaves():
    weights, x = {"a": draw(5, 9), "b": draw(9, 8), "c": draw(8, 3)}, draw(2, 5)

    def net(w, x):
        return jnp.tanh(jax.nn.relu(x @ w["a"]) @ w["b"]) @ w["c"]

    groups = structure.find_groups(net, weights, x)
    plan = groups.plan(halves(groups), multiple=1)
    small, wrapped = plan.compact(weights), plan.wrap(net)
    left = groups.compact(plan)
    found = structure.find_groups(wrapped, small, x)
    assert list(left) == list(found) and left.model == found.model
    for name, group in found.items():
        ours = left[name]
        assert ours.size == group.size and ours.exact == group.exact
        for one, other in zip(ours.members + ours.gates, group.members + group.gates, strict=True):
            assert one[:2] == other[:2] and one.produces == other.produces
            np.testing.assert_array_equal(one.channels, other.channels)
    after = left.plan(halves(left, seed=1), multiple=1)
    both = plan.then(after)
    smaller = after.compact(small)
    jax.tree.map(np.testing.assert_array_equal, both.compact(weights), smaller)
    np.testing.assert_array_equal(both.wrap(net)(smaller, x), after.wrap(wrapped)(smaller, x))
    with pytest.raises(ValueError, match=r"`after` must be a plan for the variables compacted"):
        plan.then(plan)
    with pytest.raises(ValueError, match="`plan` must be made from these groups"):
        left.compact(plan)


# ---- several devices


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    with jax.set_mesh(
        jax.sharding.Mesh(devices, ("data", "model"), axis_types=(request.param,) * 2)
    ):
        yield jax.sharding.get_mesh()


SPECS = {"a": P(None, "model"), "bias": P("model"), "b": P("model", None)}


def sharded_net(mesh):
    explicit = AxisType.Explicit in mesh.axis_types

    def product(x, kernel, spec):
        return jnp.einsum("bi,io->bo", x, kernel, out_sharding=spec if explicit else None)

    def net(w, x):
        hidden = product(x, w["a"], P("data", "model"))
        if not explicit:
            split = NamedSharding(mesh, P("data", "model"))
            hidden = jax.lax.with_sharding_constraint(hidden, split)
        return product(jax.nn.relu(hidden + w["bias"][None]), w["b"], P("data", None))

    return net


@pytest.mark.slow
def test_what_stays_is_sharded_as_before(mesh):
    net = sharded_net(mesh)
    weights = {"a": draw(16, 32), "bias": draw(32), "b": draw(32, 16)}
    weights = {n: jax.device_put(w, NamedSharding(mesh, SPECS[n])) for n, w in weights.items()}
    x = jax.device_put(draw(8, 16), NamedSharding(mesh, P("data", None)))
    groups = structure.find_groups(net, weights, x)
    assert [(group.name, group.size) for group in groups.values()] == [("a:1", 32)]
    plan = groups.plan(halves(groups), multiple=1)
    small = plan.compact(weights)
    for name, leaf in small.items():
        assert leaf.sharding == weights[name].sharding and 16 in leaf.shape
    assert plan.verify(net, weights, x) < 1e-5
    odd = groups.plan({"a:1": np.arange(32) < 15}, multiple=1)
    with pytest.raises(ValueError, match="a: dimension 1 keeps 15, to be split into 2 over model"):
        odd.compact(weights)


# ---- a plan in words


def two_layers(w, x):
    return jax.nn.relu(x @ w["first"]["kernel"] + w["first"]["bias"][None]) @ w["last"]["kernel"]


TWO_LAYERS = {
    "first": {"kernel": draw(16, 64), "bias": draw(64)},
    "last": {"kernel": draw(64, 10)},
}


def test_a_plan_prints_what_changes_and_the_totals():
    groups = structure.find_groups(two_layers, TWO_LAYERS, draw(2, 16))
    assert str(groups.plan(halves(groups), multiple=1)).splitlines() == [
        "first/bias [64] -> [32]",
        "first/kernel [16x64] -> [16x32]",
        "last/kernel [64x10] -> [32x10]",
        "Parameters: 1,728 -> 864 (50.0%); leaves that stay as they are: 0 of 3",
    ]
    assert str(groups.plan({})) == (
        "Parameters: 1,728 -> 1,728 (100.0%); leaves that stay as they are: 3 of 3"
    )


def test_a_plan_counts_parameters_only_and_prints_state_that_changes():
    trace = Trace(decode, (draw(2, 5), jnp.int32(2)), lambda output: output[1])
    groups = structure.find_groups([trace], CACHED)
    plan = groups.plan(halves(groups), multiple=1)
    assert f"{plan}".splitlines() == [
        "cache/keys [2x4x8] -> [2x4x4]",
        "key [5x8] -> [5x4]",
        "out [8x5] -> [4x5]",
        "query [5x8] -> [5x4]",
        "Parameters: 120 -> 60 (50.0%); leaves that stay as they are: 0 of 4",
    ]


def test_a_plan_without_leaves_or_parameters_prints():
    empty = structure.Plan(structure.Model({}, frozenset()), {})
    assert str(empty) == "Parameters: 0 -> 0; leaves that stay as they are: 0 of 0"
    scalar = structure.Plan(structure.Model({"w": ()}, frozenset({"w"})), {"w": []})
    assert str(scalar) == "Parameters: 1 -> 1 (100.0%); leaves that stay as they are: 1 of 1"
