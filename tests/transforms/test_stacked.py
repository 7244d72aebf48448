"""Stacked leaves hold many copies of a layer: whatever is said of a layer holds for each copy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import budgets, layouts, patterns, timetables
from tests.support.combinations import in_turn

WINDOW = {"every": 2, "start": 0, "stop": 4}
TRANSFORMS = {
    "agip": jaxprune.agip_transform,
    "agip, regrowth": lambda s, **o: jaxprune.agip_transform(s, regrow=0.4, **o),
    "magnitude": jaxprune.magnitude_transform,
    "random": jaxprune.random_transform,
    "saliency": jaxprune.saliency_transform,
    "set": jaxprune.set_transform,
    "rigl": jaxprune.rigl_transform,
    "straight through": jaxprune.straight_through_transform,
    "acdc": jaxprune.acdc_transform,
}
BUDGETS = {
    "uniform": budgets.uniform,
    "global": budgets.global_budget(0.2),
    "erdos_renyi": budgets.erdos_renyi,
    "erdos_renyi_kernel": budgets.erdos_renyi_kernel,
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def under(axis):
    """Everything whose path begins with `layers`."""
    return lambda path, leaf: axis if path.startswith("layers") else None


def stacked_network(axis):
    """Three layers in one leaf beside a head, and the same with a leaf for each layer."""
    scales = jnp.linspace(0.3, 1.0, 3)
    copies = [scale * normal(i, 8, 16) for i, scale in enumerate(scales)]
    head = {"kernel": normal(7, 16, 4), "bias": jnp.zeros(4)}
    stack = {"head": head, "layers": {"kernel": jnp.stack(copies, axis)}}
    # The lists sort behind the head, as the stack does.
    return stack, {"head": head, "layers": [{"kernel": copy} for copy in copies]}


def test_uniform_keeps_the_same_share_of_each_layer():
    stack = {"kernel": normal(0, 12, 64, 256) * jnp.linspace(0.3, 1, 12)[:, None, None]}
    masks = jaxprune.prune(stack, 0.9, budget=budgets.uniform, stacked=lambda path, leaf: 0)[1]
    kept = np.asarray(masks["kernel"]).sum((1, 2))
    assert kept.tolist() == [budgets.keep_count(64 * 256, 0.9)] * 12
    alone = jaxprune.prune(stack, 0.9, budget=budgets.uniform)[1]["kernel"]
    assert np.asarray(alone)[0].mean() < 0.001  # nothing says that it is a stack


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("pattern", [None, patterns.channels(axis=-1), patterns.blocks((4, 2))])
def test_a_stack_is_pruned_like_its_copies(axis, budget, pattern):
    stack, separate = stacked_network(axis)
    options = {"budget": BUDGETS[budget], "pattern": pattern}
    masks = jaxprune.prune(stack, 0.6, stacked=under(axis), **options)[1]
    wanted = jaxprune.prune(separate, 0.6, **options)[1]
    np.testing.assert_array_equal(masks["head"]["kernel"], wanted["head"]["kernel"])
    copies = np.moveaxis(np.asarray(masks["layers"]["kernel"]), axis, 0)
    for mask, layer in zip(copies, wanted["layers"], strict=True):
        np.testing.assert_array_equal(mask, layer["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_n_m_lies_within_a_layer(axis):
    stack, separate = stacked_network(axis)
    pattern = patterns.n_m(2, 4, axis=-2)
    masks = jaxprune.prune(stack, 0.5, stacked=under(axis), pattern=pattern)[1]
    wanted = jaxprune.prune(separate, 0.5, pattern=pattern)[1]
    copies = np.moveaxis(np.asarray(masks["layers"]["kernel"]), axis, 0)
    for mask, layer in zip(copies, wanted["layers"], strict=True):
        np.testing.assert_array_equal(mask, layer["kernel"])


def test_channels_are_those_of_each_layer():
    stack = {"layers": normal(3, 3, 8, 16)}
    options = {"pattern": patterns.channels(axis=-1), "budget": budgets.uniform}
    masks = jaxprune.prune(stack, 0.5, stacked=under(0), **options)[1]["layers"]
    kept = np.asarray(masks).any(1)  # [layers, channels]
    assert kept.sum(1).tolist() == [8, 8, 8]
    assert (kept[0] != kept[1]).any() and (kept[1] != kept[2]).any()


def test_erdos_renyi_does_not_count_layers_as_positions():
    shapes = {"layers": jax.ShapeDtypeStruct((12, 64, 64), jnp.float32)}
    shapes["head"] = jax.ShapeDtypeStruct((64, 10), jnp.float32)
    rule = budgets.erdos_renyi_kernel
    plan = timetables.make_timetable(shapes, [0], [0.5], budget=rule, stacked=under(0))
    alone = {f"layers[{i}]": (64, 64) for i in range(12)} | {"head": (64, 10)}
    assert plan.rankings[0].floors[0].tolist() == list(rule(alone, 0.5).floors)


def test_an_idle_expert_keeps_its_floor():
    experts = {"layers": normal(0, 4, 16, 32) * jnp.array([1, 1, 1, 1e-6])[:, None, None]}
    masks = jaxprune.prune(experts, 0.9, stacked=under(0))[1]["layers"]
    kept = np.asarray(masks).sum((1, 2))
    total = budgets.keep_count(4 * 512, 0.9)
    assert kept.sum() == total
    assert kept[3] == total // 4 // 10  # a tenth of its share


def test_two_axes_and_a_copy_that_is_one_weight():
    leaf = {"layers": normal(0, 2, 3, 4, 5), "one": normal(1, 6, 1)}

    def stacked(path, leaf):
        return (0, 1) if path == "layers" else (0, -1)

    plan = timetables.make_timetable(leaf, [0], [0.5], budget=budgets.uniform, stacked=stacked)
    assert plan.rankings[0].floors[0].tolist() == [10] * 6 + [1] * 6


def test_a_budget_may_name_copies():
    rule = budgets.custom({"layers/kernel[1]": 0.0})
    stack, _ = stacked_network(0)
    masks = jaxprune.prune(stack, 0.5, budget=rule, stacked=under(0))[1]
    kept = np.asarray(masks["layers"]["kernel"]).sum((1, 2))
    assert kept[1] == 128 and kept[0] < 128 and kept[2] < 128


def test_a_budget_may_name_the_whole_stack():
    rule = budgets.custom({"layers/kernel": 0.75})
    masks = jaxprune.prune(stacked_network(0)[0], 0.78, budget=rule, stacked=under(0))[1]
    assert np.asarray(masks["layers"]["kernel"]).sum((1, 2)).tolist() == [32] * 3


@pytest.mark.slow
@settings(max_examples=8)
@given(seed=st.integers(0, 5), axis=st.integers(0, 2), fraction=st.sampled_from([0.0, 0.3]))
def test_regrowth_keeps_each_copy_at_its_number(seed, axis, fraction):
    leaf = {"layers": normal(seed, 3, 4, 5)}
    budget = {"budget": budgets.uniform, "stacked": lambda path, leaf: axis}
    plan = timetables.make_timetable(leaf, [0], [0.5], moved=[fraction], **budget)
    masks = timetables.select(plan, 0, [jnp.abs(leaf["layers"])])
    new = timetables.renew(plan, 0, masks, [normal(seed + 1, 3, 4, 5)], [normal(seed + 2, 3, 4, 5)])
    before, after = (np.moveaxis(np.asarray(m[0]), axis, 0) for m in (masks, new))
    size = 60 // before.shape[0]
    for old, own in zip(before, after, strict=True):
        assert own.sum() == budgets.keep_count(size, 0.5)
        moved = int(np.floor(budgets.keep_count(size, 0.5) * fraction + 0.5))
        assert (old & ~own).sum() == min(moved, size - old.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis"), in_turn(TRANSFORMS, [0, 1]))
def test_transformations_treat_each_copy_as_a_leaf(name, axis):
    """The same training on a stack and on a leaf for each layer gives the same masks."""
    trees = stacked_network(axis)
    results = []
    for params, stacked in zip(trees, (under(axis), None), strict=True):
        transform = TRANSFORMS[name](0.6, budget=budgets.uniform, stacked=stacked, **WINDOW)
        tx = jaxprune.chain(optax.sgd(0.05, momentum=0.9), transform)
        step, state = jax.jit(tx.update), tx.init(params)
        for i in range(6):
            gradients = jax.tree.map(lambda w, i=i: jnp.sin(3 * w + i), params)
            updates, state = step(gradients, state, params)
            params = optax.apply_updates(params, updates)
        results.append((params, jaxprune.get_masks(state)))
    (stack, masks), (_, wanted) = results
    copies = np.moveaxis(np.asarray(masks["layers"]["kernel"]), axis, 0)
    for i, mask in enumerate(copies):
        assert mask.sum() == budgets.keep_count(128, 0.6)
        if name not in ("random", "set", "rigl"):  # whose draws depend on the place in a leaf
            np.testing.assert_array_equal(mask, wanted["layers"][i]["kernel"])
    weights = np.asarray(stack["layers"]["kernel"])
    assert (weights[~np.asarray(masks["layers"]["kernel"])] == 0).all()


def test_biases_and_norms_of_a_stack_are_not_pruned():
    params = {
        "layers": {"w": normal(0, 3, 8, 8), "offsets": normal(1, 3, 8)},
        "head": {"w": normal(2, 8, 2)},
    }
    masks = jaxprune.prune(params, 0.5, stacked=under(0))[1]
    assert bool(masks["layers"]["offsets"].all())
    state = jaxprune.magnitude_transform(0.5, stop=1, stacked=under(0)).init(params)
    assert isinstance(state.masks["layers"]["offsets"], optax.MaskedNode)


@pytest.mark.slow
def test_scanned_vectors_are_not_pruned():
    """`layouts.find` knows the copies of what is no kernel: `mix` has one dimension."""
    params = {"layers": {"kernel": normal(0, 4, 16, 16), "mix": normal(1, 4, 16)}}
    params["head"] = normal(2, 16, 4)

    def apply(params, x):
        def layer(x, own):
            return jax.nn.relu((x * own["mix"][None]) @ own["kernel"]), None

        return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]

    found = layouts.find(apply, params, jnp.ones((2, 16)))
    assert found.stacked("layers/mix", params["layers"]["mix"]) == (0,)
    assert found.stacked("head", params["head"]) is None
    options = {"stacked": found.stacked, "budget": budgets.uniform}
    masks = jaxprune.prune(params, 0.5, **options)[1]
    assert masks["layers"]["mix"].all()
    assert masks["layers"]["kernel"].sum((1, 2)).tolist() == [128] * 4
    # Whoever wants it pruned says so, and each copy then keeps its share.
    masks = jaxprune.prune(params, 0.5, prunable=lambda path, leaf: path != "head", **options)[1]
    assert masks["layers"]["mix"].sum(1).tolist() == [8] * 4


@pytest.mark.slow
def test_a_sharded_stack_gets_the_same_masks():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = {"layers": normal(0, 4, 8, 16)}
    tx = jaxprune.agip_transform(0.7, stop=2, every=1, stacked=under(0), budget=budgets.uniform)
    masks = []
    for spec in (None, jax.P("x", None, "y"), jax.P(None, "x", "y")):
        placed = params
        if spec is not None:
            placed = jax.device_put(params, jax.NamedSharding(mesh, spec))
        state, step = jax.jit(tx.init)(placed), jax.jit(tx.update)
        for _ in range(4):
            _, state = step(jax.tree.map(jnp.cos, placed), state, placed)
        masks.append(jaxprune.get_masks(state))
    chex.assert_trees_all_equal(*masks)


@pytest.mark.parametrize("bad", [3, (0, 0), (0, -3), "layers", 1.5, True])
def test_axes_that_do_not_exist_are_named(bad):
    with pytest.raises(ValueError, match=r"`stacked` must return axes .* for layers of shape"):
        jaxprune.prune({"layers": jnp.ones((2, 3, 4))}, 0.5, stacked=lambda path, leaf: bad)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layouts_find_inputs_of_each_copy(axis):
    """`stacked=` shows a pattern single copies, whose axes are not those of the leaf."""
    stack, separate = stacked_network(axis)
    stack = {"layers": stack["layers"]}

    def apply(params, x):
        kernels = jnp.moveaxis(params["layers"]["kernel"], axis, 0)
        return jax.lax.scan(lambda total, w: (total + x @ w, None), jnp.zeros((2, 16)), kernels)[0]

    found = layouts.find(apply, stack, jnp.ones((2, 8)))
    assert found["layers/kernel"].copies == (axis,)
    single = separate["layers"]
    for rule, wanted in (
        (patterns.n_m(2, 4, layouts=found), patterns.n_m(2, 4, axis=-2)),
        (patterns.channels(layouts=found), patterns.channels(axis=-1)),
    ):
        options = {"budget": budgets.uniform}
        masks = jaxprune.prune(stack, 0.5, pattern=rule, stacked=under(axis), **options)[1]
        expected = jaxprune.prune(single, 0.5, pattern=wanted, **options)[1]
        copies = np.moveaxis(np.asarray(masks["layers"]["kernel"]), axis, 0)
        for mask, layer in zip(copies, expected, strict=True):
            np.testing.assert_array_equal(mask, layer["kernel"])


# Those that differ in what they do with gradients.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["agip, regrowth", "saliency", "rigl", "straight through", "acdc"])
def test_shard_map_over_data_gives_the_masks_of_one_device(name):
    """Parameters and state are replicated, the batch is split."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"head": normal(0, 8, 4) / 3, "layers": normal(1, 3, 8, 8) / 3}
    transform = TRANSFORMS[name](0.5, stacked=under(0), budget=budgets.uniform, **WINDOW)
    tx = jaxprune.chain(optax.sgd(0.01, momentum=0.9), transform)

    def loss(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer)
        return jnp.mean((x @ params["head"]) ** 2)

    def step(shards, params, state, x):
        # Inside of shard_map the gradient of what is replicated is the sum over devices.
        gradients = jax.tree.map(lambda g: g / shards, jax.grad(loss)(params, x))
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    split = jax.shard_map(
        functools.partial(step, 4),
        mesh=mesh,
        in_specs=(jax.P(), jax.P(), jax.P("data")),
        out_specs=(jax.P(), jax.P()),
    )
    results = []
    for run in (functools.partial(step, 1), split):
        now, state = params, tx.init(params)
        for i in range(6):
            now, state = jax.jit(run)(now, state, normal(i, 16, 8))
        results.append((now, jaxprune.get_masks(state)))
    chex.assert_trees_all_equal(results[0][1], results[1][1])
    chex.assert_trees_all_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    kept = np.asarray(results[1][1]["layers"]).sum((1, 2))
    assert kept.tolist() == [32] * 3
