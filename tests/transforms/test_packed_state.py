"""Optimizer state of kept weights: the numbers of the dense state, in less memory."""

import functools
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import checkpoints, structure, testing, trees
from jaxprune.transforms import PackedState, Room, _positions

ROOT = Path(__file__).parents[2]
SHAPES = {"a": {"kernel": (16, 24), "bias": (24,)}, "b": {"kernel": (24, 16)}}
is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
ELEMENTWISE = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "nesterov": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.01),
    # The rule for what decays sees the number of dimensions.
    "adamw": lambda: optax.adamw(
        0.01, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)
    ),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(0.01, momentum=0.9),
}
MORE = ELEMENTWISE | {
    "adagrad": lambda: optax.adagrad(0.1),  # its state does not start at 0
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.01), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.01, 0.001, 9)),
    "partition": lambda: optax.partition(
        {"x": optax.adam(0.01), "y": optax.sgd(0.1)}, {"a": "x", "b": {"kernel": "y"}}
    ),
}


def draw(seed: int, dtype: Any = jnp.float32) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), dtype), SHAPES, is_leaf=is_shape
    )


def pruned(sparsity: float = 0.8, seed: int = 100, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    params, masks = jaxprune.prune(draw(seed), sparsity)
    return jax.tree.map(lambda x: x.astype(dtype), params), masks


def train(tx: Any, params: Any, steps: int, update: Any = None, state: Any = None) -> Any:
    """Parameters and state after steps on random gradients; the sum is a program of its own."""
    update = jax.jit(tx.update) if update is None else update
    state = tx.init(params) if state is None else state
    dtype = jax.tree.leaves(params)[0].dtype
    for step in range(steps):
        updates, state = update(draw(step % 20, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def whole(state: PackedState, masks: Any) -> Any:
    """The inner state with arrays in the shapes of their leaves, and 0 for pruned weights."""
    masks = trees.leaf_by_path(masks)
    positions = trees.leaf_by_path(state.positions)
    mirrored = _positions.owners(state.inner, {path: x.shape for path, x in positions.items()})

    def spread(leaf: Any, path: str | None) -> Any:
        if path is None:
            return leaf
        flat = np.zeros(masks[path].size + 1, leaf.dtype)
        flat[np.asarray(positions[path]).ravel()] = np.asarray(leaf).ravel()
        return flat[:-1].reshape(masks[path].shape)

    leaves, treedef = jax.tree.flatten(state.inner)
    return treedef.unflatten(list(map(spread, leaves, mirrored)))


def kept_moments(state: Any, masks: Any) -> Any:
    """A dense state with 0 for pruned weights, as `whole` returns it."""
    masks = trees.leaf_by_path(masks)

    def keep(path: Any, leaf: Any) -> Any:
        owner = _positions.ending(trees.path_string(path), masks)
        fits = owner is not None and jnp.shape(leaf) == jnp.shape(masks[owner])
        return np.where(masks[owner], leaf, 0) if fits else leaf

    return jax.tree_util.tree_map_with_path(keep, state)


# ---- positions


def reference(old: list[int], mask: np.ndarray, capacity: int) -> list[int]:
    """The positions that follow a mask, by sets."""
    kept = [int(i) for i in np.flatnonzero(mask)]
    first = [i for i in kept if i in old]
    rest = [i for i in kept if i not in old]
    return sorted(first + rest[: capacity - len(first)])


@hypothesis.given(data=st.data())
def test_positions_follow_masks_as_sets_do(data):
    size = data.draw(st.integers(1, 12))
    capacity = data.draw(st.integers(1, size))
    bits = st.lists(st.booleans(), min_size=size, max_size=size)
    masks = data.draw(st.lists(bits, min_size=1, max_size=4))
    held: dict[int, int] = {}
    positions = jnp.full((1, capacity), size, jnp.int32)
    values = jnp.zeros((1, capacity))
    for step, mask in enumerate(masks):
        mask = np.array(mask)
        expected = reference(list(held), mask, capacity)
        settled = bool(_positions.is_settled(positions, jnp.asarray(mask)))
        assert settled == (expected == list(held))
        new = _positions.follow(positions, jnp.asarray(mask))
        assert new.dtype == jnp.int32 and new.shape == (1, capacity)
        assert new.ravel().tolist() == expected + [size] * (capacity - len(expected))
        # Values of weights that stay are kept; the others get that of this step.
        fresh = jnp.full((1, capacity), step + 1.0)
        values = _positions.moved(positions, new, size)(values, fresh)
        held = {i: held.get(i, step + 1) for i in expected}
        assert values.ravel().tolist()[: len(held)] == list(held.values())
        positions = new


@hypothesis.given(data=st.data())
def test_gather_and_scatter_are_indexing(data):
    shape = data.draw(st.sampled_from([(7,), (3, 4), (2, 2, 3)]))
    size = int(np.prod(shape))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    leaf = np.arange(1.0, size + 1).reshape(shape).astype(np.float32)
    capacity = data.draw(st.integers(max(1, int(mask.sum())), size + 3))
    positions = _positions.compacted(jnp.asarray(mask), capacity)
    packed = _positions.gather(jnp.asarray(leaf), positions)
    padding = np.zeros(capacity - mask.sum(), np.float32)
    np.testing.assert_array_equal(packed, np.concatenate([leaf.ravel()[mask], padding]))
    back = _positions.scatter(packed, positions, shape)
    np.testing.assert_array_equal(back, np.where(mask.reshape(shape), leaf, 0))


def test_capacities_have_room_and_are_multiples():
    for kept, size in [(0, 5), (1, 10), (100, 1000), (500, 1000), (990, 1000), (1000, 1000)]:
        own = _positions.capacity_of(kept, size, 0.05)
        assert min(size, kept * 1.05) <= own <= size and (own % 128 == 0 or own == size)


# ---- the numbers of the dense state


def both(inner: Any, prune: Any, **options: Any) -> tuple[Any, Any]:
    """The optimizer with dense and with packed state."""
    return (
        jaxprune.chain(inner(), prune, inner="sparse"),
        jaxprune.chain(jaxprune.pack_state(inner(), **options), prune),
    )


def compare_to_the_bit(name: str, dtype: Any) -> None:
    """Trains with dense and packed state and compares parameters and states."""
    params, masks = pruned(dtype=dtype)
    dense, packed = both(ELEMENTWISE[name], jaxprune.fixed_mask_transform(masks), density=0.5)
    expected, dense_state = train(dense, params, 200)
    found, state = train(packed, params, 200)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal(whole(state[0], masks), kept_moments(dense_state[0], masks))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), found, params)
    assert min(jax.tree.leaves(moved)) > 0.05
    assert found["a"]["kernel"].dtype == dtype


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the option names instruction sets")
def test_two_hundred_steps_are_those_of_dense_state_to_the_bit(environment):
    # A process without fused multiply-add, so that each operation is rounded: with it the compiler
    # joins some products and sums, and others in another program.
    flags = f"{environment['XLA_FLAGS']} --xla_cpu_max_isa=AVX"
    code = (
        "import jax.numpy as jnp\n"
        "from tests.transforms.test_packed_state import ELEMENTWISE, compare_to_the_bit\n"
        "for name in ELEMENTWISE:\n"
        "    compare_to_the_bit(name, jnp.float32)\n"
        "compare_to_the_bit('adamw', jnp.bfloat16)\n"
        "print('all', len(ELEMENTWISE))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"XLA_FLAGS": flags},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["all", "6"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_two_hundred_steps_are_those_of_dense_state_to_rounding(name):
    params, masks = pruned()
    txs = both(ELEMENTWISE[name], jaxprune.fixed_mask_transform(masks), density=0.5)
    expected, found = (train(tx, params, 200)[0] for tx in txs)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_the_first_steps_are_those_of_numpy(name):
    params, masks = pruned()
    tx = both(ELEMENTWISE[name], jaxprune.fixed_mask_transform(masks), density=0.5)[1]
    found, _ = train(tx, params, 3)
    for group, leaf in (("a", "kernel"), ("b", "kernel")):
        weight, mask = (np.asarray(tree[group][leaf], np.float64) for tree in (params, masks))
        first = second = np.zeros_like(weight)
        for step in range(3):
            gradient = np.asarray(draw(step)[group][leaf], np.float64)
            if name == "momentum":
                first = 0.9 * first + gradient
                move = -0.1 * first
            else:
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                mean = first / (1 - 0.9 ** (step + 1))
                move = -0.01 * mean / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
            weight = weight + mask * move
        np.testing.assert_allclose(found[group][leaf], weight, rtol=1e-4, atol=1e-5)


PRUNINGS = {
    "rigl": lambda: jaxprune.rigl_transform(0.7, every=2, start=1, stop=7, drop=0.5),
    "set": lambda: jaxprune.set_transform(0.7, every=2, start=1, stop=7, drop=0.5),
    "magnitude": lambda: jaxprune.magnitude_transform(0.7, every=2, start=1, stop=7),
    "acdc": lambda: jaxprune.acdc_transform(0.7, every=2, start=1, stop=7),
    "agip": lambda: jaxprune.agip_transform(0.7, every=2, start=1, stop=7, regrow=0.3),
}
CHANGING = [("adam", name) for name in PRUNINGS] + [(name, "rigl") for name in MORE]


@pytest.mark.parametrize(("inner", "prune"), CHANGING)
def test_where_masks_change_state_is_kept_dropped_and_started(inner, prune):
    dense, packed = both(MORE[inner], PRUNINGS[prune]())
    update = [jax.jit(tx.update) for tx in (dense, packed)]
    params = draw(100)
    states = [tx.init(params) for tx in (dense, packed)]
    changes, grown = 0, 0
    before = jaxprune.get_masks(states[0])
    for step in range(9):
        (moves, expected), (found_moves, found) = (
            call(draw(step), state, params) for call, state in zip(update, states, strict=True)
        )
        states = [expected, found]
        masks = jaxprune.get_masks(expected)
        chex.assert_trees_all_equal(jaxprune.get_masks(found), masks)
        chex.assert_trees_all_close(found_moves, moves, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(
            whole(found[0], masks), kept_moments(expected[0], masks), rtol=1e-5, atol=1e-6
        )
        params = optax.apply_updates(params, moves)
        testing.assert_masked(params, masks)
        pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(masks), strict=True))
        changes += any(bool(jnp.any(old != new)) for old, new in pairs)
        grown += sum(int(jnp.sum(~old & new)) for old, new in pairs)
        before = masks
    assert changes >= 2 and (grown > 0 or prune == "magnitude")
    assert int(states[1][0].short_steps) == 0


@pytest.mark.parametrize("capacity", [3, 4])  # 4 is the shape of the leaf
def test_weights_that_come_back_start_fresh_and_the_others_keep_their_state(capacity):
    masks = {"w": jnp.array([[True, False, True, False]])}
    tx = jaxprune.chain(
        jaxprune.pack_state(optax.adagrad(0.1), capacities={"w": capacity}),
        jaxprune.fixed_mask_transform(masks),
    )
    params = {"w": jnp.ones((1, 4))}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    state = jaxprune.set_masks(state, {"w": jnp.array([[True, True, False, False]])})
    _, state = tx.update(params, state, params)
    sums = state[0].inner[0].sum_of_squares["w"]
    assert state[0].positions["w"].tolist() == [[0, 1, 4, 4][:capacity]]
    np.testing.assert_allclose(sums[0, :2], [0.1 + 3, 0.1 + 1], rtol=1e-6)


def test_packed_arrays_in_the_shape_of_their_leaf_are_not_taken_for_dense_ones():
    prune = jaxprune.fixed_mask_transform({"w": jnp.array([[False, False, True, True]])})
    tx = jaxprune.chain(jaxprune.pack_state(optax.sgd(1.0, momentum=1.0)), prune)
    params = {"w": jnp.array([[0.0, 0.0, 1.0, 1.0]])}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert state[0].inner[0].trace["w"].tolist() == [[3.0, 3.0, 0.0, 0.0]]


# ---- room


def test_kept_weights_without_room_do_not_move_and_are_counted():
    params, masks = pruned(0.9)
    tx = jaxprune.chain(
        jaxprune.pack_state(optax.adam(0.01), capacities={"a/kernel": 40, "b/kernel": 384}),
        jaxprune.fixed_mask_transform(masks),
    )
    few = int(masks["a"]["kernel"].sum())
    assert few <= 40
    params, state = train(tx, params, 3)
    assert jaxprune.get_room(state)["a/kernel"] == Room(40, few, 0)
    assert int(state[0].short_steps) == 0
    more = masks | {"a": {"kernel": jnp.ones((16, 24), bool), "bias": True}}
    held = state[0]
    state = jaxprune.set_masks(state, more)
    assert jaxprune.get_room(state)["a/kernel"] == Room(40, 384, 344)
    updates, state = jax.jit(tx.update)(draw(5), state, params)
    move = np.asarray(updates["a"]["kernel"]).ravel()
    # Those that had a place keep it; the rest of the room goes to the lowest indices.
    old = [i for i in np.asarray(held.positions["a"]["kernel"]).ravel().tolist() if i < 384]
    expected = reference(old, np.ones(384, bool), 40)
    assert np.flatnonzero(move).tolist() == expected
    assert int(state[0].short_steps) == 1
    kept = old[0]
    first = np.asarray(whole(state[0], more)[0].mu["a"]["kernel"]).ravel()[kept]
    past = np.asarray(whole(held, masks)[0].mu["a"]["kernel"]).ravel()[kept]
    gradient = np.asarray(draw(5)["a"]["kernel"]).ravel()[kept]
    np.testing.assert_allclose(first, 0.9 * past + 0.1 * gradient, rtol=1e-5)
    # With room made for them, all move, and only these start anew.
    state = jaxprune.resize_state(state)
    assert jaxprune.get_room(state)["a/kernel"] == Room(384, 384, 0)
    updates, state = jax.jit(tx.update)(draw(6), state, params)
    assert int(jnp.sum(updates["a"]["kernel"] != 0)) == 384
    assert int(state[0].short_steps) == 1


def test_a_ramp_with_resized_state_gives_the_same_numbers_in_less_memory():
    prune = jaxprune.magnitude_transform(0.8, every=2, start=2, stop=10)
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01)), prune)
    params = draw(100)
    state, update = tx.init(params), jax.jit(tx.update)
    expected, plain = params, state
    capacities = []
    for step in range(14):
        moves, plain = update(draw(step), plain, expected)
        expected = optax.apply_updates(expected, moves)
        moves, state = update(draw(step), state, params)
        params = optax.apply_updates(params, moves)
        if step in (4, 8, 11):
            state = jaxprune.resize_state(state)
            capacities.append(jaxprune.get_room(state)["a/kernel"].capacity)
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    masks = jaxprune.get_masks(state)
    chex.assert_trees_all_equal(masks, jaxprune.get_masks(plain))
    chex.assert_trees_all_close(
        whole(state[0], masks), whole(plain[0], masks), rtol=1e-5, atol=1e-6
    )
    assert capacities == sorted(capacities, reverse=True) and capacities[-1] == 128
    assert state[0].inner[0].nu["a"]["kernel"].shape == (1, 128)
    # Nothing but shapes changes: what was kept is kept, exactly.
    again = jaxprune.resize_state(state, room=2.0)
    assert again[0].positions["a"]["kernel"].size > 128
    chex.assert_trees_all_equal(whole(again[0], masks), whole(state[0], masks))


def test_a_resized_state_is_saved_and_restored_with_its_capacities(tmp_path):
    params, masks = pruned(0.9)
    prune = jaxprune.fixed_mask_transform(masks)
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01)), prune)
    params, state = train(tx, params, 3)
    state = jaxprune.resize_state(state)
    room = {path: own.capacity for path, own in jaxprune.get_room(state).items()}
    manager = checkpoints.open_manager(tmp_path)
    checkpoints.save(manager, 3, (params, state), {"room": room})
    room = checkpoints.read_record(manager)["room"]
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01), capacities=room), prune)
    like = jax.eval_shape(lambda params: (params, tx.init(params)), params)
    (found, restored), _ = checkpoints.restore(manager, like)
    manager.close()
    chex.assert_trees_all_equal((found, restored), (params, state))
    chex.assert_trees_all_equal(
        train(tx, found, 3, state=restored), train(tx, params, 3, state=state)
    )


def test_room_by_name_and_bytes_of_the_state():
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct((*s[:-1], 64 * s[-1]), jnp.float32),
                          SHAPES, is_leaf=is_shape)  # fmt: skip
    tx = jaxprune.pack_state(optax.adam(0.1), density={"a": 0.1})
    state = jax.eval_shape(tx.init, params)
    sizes = {path: x.size for path, x in trees.leaf_by_path(state.positions).items()}
    assert sizes == {"a/kernel": 2688, "b/kernel": 24576}
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert held == 3 * 4 * (2688 + 24576) + 2 * 4 * 24 * 64 + 2 * 4


# ---- what surrounds it


def test_one_program_with_donation_and_the_numbers_of_a_scan():
    params = draw(100)
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01), density=0.5), PRUNINGS["rigl"]())
    expected, state = train(tx, params, 9)
    gradients = jax.tree.map(lambda *x: jnp.stack(x), *map(draw, range(9)))

    def step(carry: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    scanned = jax.jit(lambda start: jax.lax.scan(step, start, gradients)[0])
    found, _ = scanned((params, tx.init(params)))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)

    donated = jax.jit(testing.traced_once(lambda *x: step(x[:2], x[2])[0]), donate_argnums=(0, 1))
    carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a buffer that could not be donated
        for number in range(9):
            carry = donated(*carry, draw(number))
    chex.assert_trees_all_close(carry[0], expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(carry[1]) == jax.tree.structure(state)


def test_several_networks_at_once():
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01), density=0.5), PRUNINGS["rigl"]())
    many = jax.tree.map(lambda *x: jnp.stack(x), draw(100), draw(101))
    state = jax.vmap(tx.init)(many)
    update = jax.jit(jax.vmap(tx.update, (None, 0, 0)))
    for step in range(9):
        updates, state = update(draw(step), state, many)
        many = optax.apply_updates(many, updates)
    for number in range(2):
        expected, _ = train(tx, draw(100 + number), 9)
        own = jax.tree.map(lambda x, number=number: x[number], many)
        chex.assert_trees_all_close(own, expected, rtol=1e-5, atol=1e-6)
    for call in (jaxprune.get_room, jaxprune.resize_state):
        with pytest.raises(ValueError, match="packed for several networks"):
            call(state)


def test_the_laws_of_pruning_hold_behind_packed_state():
    # At decay 0 the trace passes gradients through and still has a state of each weight.
    def make(sparsity: float) -> Any:
        prune = jaxprune.magnitude_transform(sparsity, every=2, start=1, stop=6)
        return jaxprune.chain(jaxprune.pack_state(optax.trace(0.0)), prune)

    found = testing.check_transform(make)
    assert set(found.values()) == {"holds"} and len(found) == len(testing.LAWS)


SPLITS = {
    "rows": {"a": {"kernel": P("x"), "bias": P()}, "b": {"kernel": P("x")}},
    "both": {"a": {"kernel": P("x", "y"), "bias": P("y")}, "b": {"kernel": P("x", "y")}},
}


@pytest.mark.parametrize(
    ("split", "kind"),
    [("rows", AxisType.Explicit), ("both", AxisType.Auto), ("both", AxisType.Explicit)],
)
def test_split_leaves_give_the_numbers_of_one_device(split, kind):
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01), density=0.5), PRUNINGS["rigl"]())
    expected, one = train(tx, draw(100), 5)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
                            tree, SPLITS[split])  # fmt: skip

    with jax.set_mesh(mesh):
        params = place(draw(100))
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(5):
            updates, state = update(place(draw(step)), state, params)
            params = optax.apply_updates(params, updates)
            if step == 2:
                state = jaxprune.resize_state(state, room=0.5)
        room = jaxprune.get_room(state)
    chex.assert_trees_all_equal(jaxprune.get_masks(state), jaxprune.get_masks(one))
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)
    assert room == {
        path: own._replace(capacity=room[path].capacity)
        for path, own in jaxprune.get_room(one).items()
    }
    kernel = params["a"]["kernel"]
    assert kernel.sharding.is_equivalent_to(place(draw(100))["a"]["kernel"].sharding, 2)


def test_shards_inside_shard_map_are_refused_and_copies_are_not():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    params, masks = pruned()
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01)), jaxprune.fixed_mask_transform(masks))
    state = tx.init(params)
    specs = jax.tree.map(lambda _: P(), state)
    mapped = functools.partial(jax.shard_map, mesh=mesh)
    whole = jax.tree.map(lambda _: P(), params)
    updates, _ = jax.jit(
        mapped(tx.update, in_specs=(whole, specs, whole), out_specs=(whole, specs))
    )(draw(0), state, params)
    chex.assert_trees_all_close(updates, tx.update(draw(0), state, params)[0], rtol=1e-5)

    alone = jaxprune.pack_state(optax.adam(0.01))
    state = alone.init(params)
    specs, rows = jax.tree.map(lambda _: P(), state), jax.tree.map(lambda _: P("x"), params)
    masks = jax.tree.map(lambda x: jnp.ones_like(x, bool), params)
    call = mapped(
        lambda g, s, p, m: alone.update(g, s, p, masks=m),
        in_specs=(rows, specs, rows, rows),
        out_specs=(rows, specs),
    )
    with pytest.raises(ValueError, match="`params` must be whole leaves, but are shards"):
        call(draw(0), state, params, masks)


WRAPPED = {
    "masked": lambda tx: optax.masked(tx, {"a": {"kernel": True, "bias": False}, "b": False}),
    "named_chain": lambda tx: optax.named_chain(("first", tx)),
    "in a chain": lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(0.5)),
    "behind a norm": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda rate: optax.chain(tx, optax.scale(rate))
    )(rate=0.5),
    "partition": lambda tx: optax.partition(
        {"x": tx, "y": optax.sgd(0.1)}, {"a": {"kernel": "x", "bias": "y"}, "b": "y"}
    ),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_pass_the_masks_on(name):
    results = []
    for inner in (optax.adam(0.01), jaxprune.pack_state(optax.adam(0.01), density=0.5)):
        tx = jaxprune.chain(WRAPPED[name](inner), PRUNINGS["rigl"]())
        results.append(train(tx, draw(100), 9))
    chex.assert_trees_all_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert jaxprune.get_room(results[1][1])["a/kernel"].short == 0


@pytest.mark.parametrize("name", ["outside", "inside"])
def test_micro_batches_and_chains_around(name):
    results = []
    for inner in (optax.adam(0.01), jaxprune.pack_state(optax.adam(0.01), density=0.5)):
        prune = PRUNINGS["rigl"]()
        if name == "outside":
            tx = optax.MultiSteps(jaxprune.chain(inner, prune), 2).gradient_transformation()
        else:
            tx = jaxprune.chain(jaxprune.chain(optax.clip(1.0), inner), prune)
        results.append(train(tx, draw(100), 12)[0])
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_masks_can_be_passed_without_a_chain():
    params, masks = pruned()
    tx = optax.chain(jaxprune.pack_state(optax.adam(0.01), density=0.5),
                     jaxprune.fixed_mask_transform(masks))  # fmt: skip
    state = tx.init(params)
    updates, _ = tx.update(draw(0), state, params, masks=masks)
    chained = jaxprune.chain(optax.adam(0.01), jaxprune.fixed_mask_transform(masks))
    expected, _ = chained.update(draw(0), chained.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="`masks` are missing: packed state follows masks"):
        tx.update(draw(0), state, params)


def test_a_module_of_nnx_and_the_tools_of_optax():
    model = nnx.Linear(24, 32, rngs=nnx.Rngs(0))
    prune = lambda: jaxprune.rigl_transform(0.7, every=2, stop=4)  # noqa: E731
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01), density=0.5), prune())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    gradients = nnx.state(model, nnx.Param)
    for _ in range(4):
        optimizer.update(model, gradients)
    kernel = np.asarray(model.kernel[...])
    mask = np.asarray(trees.leaf_by_path(jaxprune.get_masks(optimizer.opt_state))["kernel"])
    assert not kernel[~mask].any() and (kernel[mask] != 0).mean() > 0.5
    assert jaxprune.get_room(optimizer.opt_state)["kernel"] == Room(512, mask.sum(), 0)
    state = tx.init({"kernel": jnp.ones((24, 32))})
    twice = optax.tree_map_params(tx, lambda x: jnp.stack([x, x]), state)
    assert twice[0].inner[0].mu["kernel"].shape == (2, *state[0].inner[0].mu["kernel"].shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_with_numbers_of_64_bits(dtype):
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.01), density=0.5), PRUNINGS["rigl"]())
    dense = jaxprune.chain(optax.adam(0.01), PRUNINGS["rigl"]())
    with jax.enable_x64(True):
        params = draw(100, dtype)
        before = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(params))
        found, state = train(tx, params, 9)
        expected, _ = train(dense, params, 9)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        resized = jaxprune.resize_state(state)
        assert resized[0].positions["a"]["kernel"].dtype == np.int32


# ---- refused


def positions_of(leaf: Any) -> Any:
    return jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (optax.lamb(0.1), "(?s)depend only on its own.*a/kernel: reduce_sum"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), "b/kernel: reduce_sum"),
        (optax.adafactor(0.1), "v_row/a/kernel: shape .1., of the leaf a/kernel"),
        (optax.contrib.muon(0.1), "a/kernel: dot_general"),
        (optax.flatten(optax.adam(0.1)), "state/0/mu: shape .the leaf."),
        (optax.sm3(0.1), "shape .the leaf."),
        (optax.lbfgs(), "shape .10, 1, the leaf."),
        (optax.noisy_sgd(0.1, key=jax.random.key(0)), "random_bits"),
        (optax.polyak_sgd(), "cannot be traced with gradients and parameters alone"),
        (optax.stateless_with_tree_map(lambda g, p: jnp.cumsum(g, -1)), "a/kernel: cumsum"),
        (optax.stateless_with_tree_map(lambda g, p: g * positions_of(g)), "a/kernel: iota"),
        (
            jaxprune.chain(optax.adam(0.1), jaxprune.magnitude_transform(0.5, stop=3)),
            "`inner` must be an optimizer, but prunes",
        ),
    ],
)
def test_optimizers_that_are_not_elementwise_are_refused(inner, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.pack_state(inner).init(draw(0))


def test_norms_may_stand_beside_it_and_plain_leaves_are_not_concerned():
    clip = optax.clip_by_global_norm(1.0)
    results = []
    for inner in (optax.adam(0.01), jaxprune.pack_state(optax.adam(0.01), density=0.5)):
        results.append(train(jaxprune.chain(clip, inner, PRUNINGS["rigl"]()), draw(100), 9)[0])
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
    # A norm of a leaf that is not packed is none of ours.
    labels = {"a": {"kernel": "x", "bias": "y"}, "b": "x"}
    inner = optax.partition({"x": optax.adam(0.1), "y": optax.lamb(0.1)}, labels)
    jaxprune.pack_state(inner).init(draw(0))


@pytest.mark.parametrize(
    ("pack", "prune", "message"),
    [
        ({"density": 0.1}, lambda: jaxprune.rigl_transform(0.4, stop=9),
         r"(?s)must have room.*resize_state.*a/kernel: room for 128 of 384 weights, but \d+ are"),
        ({"density": 0.3}, PRUNINGS["magnitude"], "a/kernel: room for 128 of 384 weights, but 384"),
        ({"density": 0.3}, lambda: jaxprune.rigl_transform(0.9, stop=9, prunable="a/kernel"),
         "b/kernel: .* 384 are kept, because pruning has no mask for it"),
        ({}, lambda: jaxprune.agip_transform(0.7, stop=9, decay=None), "so does `jaxprune.pack_st"),
        ({}, lambda: jaxprune.straight_through_transform(0.7, stop=9), "StraightThroughState"),
    ],
)  # fmt: skip
def test_what_cannot_work_with_pruning_is_refused_at_the_start(pack, prune, message):
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.1), **pack), prune())
    with pytest.raises(ValueError, match=message):
        tx.init(draw(0))


def test_what_members_see_cannot_be_dense():
    tx = jaxprune.chain(jaxprune.pack_state(optax.adam(0.1)), PRUNINGS["agip"](), inner="dense")
    with pytest.raises(ValueError, match='`inner="dense"` needs state for all weights'):
        tx.init(draw(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "`density` must be the fraction"),
        ({"density": 1.5}, "all leaves: 1.5"),
        ({"density": True}, "all leaves: True"),
        ({"density": {"a": -1}}, "a: -1"),
        ({"density": {"nothing": 0.5}}, "nothing"),
        ({"capacities": {"a/bias": 3}}, "a/bias: not packed"),
        ({"capacities": {"a/kernel": 0}}, "a/kernel: 0 of 384 weights"),
        ({"capacities": {"a/kernel": 385}}, "a/kernel: 385 of 384 weights"),
    ],
)
def test_wrong_room_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.pack_state(optax.adam(0.1), **options).init(draw(0))


def test_wrong_states_and_masks_are_refused():
    params, masks = pruned()
    tx = jaxprune.pack_state(optax.adam(0.1), density=0.5)
    state = tx.init(params)
    other = {"a": {"kernel": jnp.ones((16, 24, 1)), "bias": jnp.ones(24)}}
    with pytest.raises(ValueError, match="(?s)`state` must belong.*b/kernel: packed, but no param"):
        tx.update(other, state, other, masks=masks)
    bad = masks | {"a": {"kernel": jnp.ones((2, 2), bool), "bias": True}}
    with pytest.raises(ValueError, match=r"a/kernel: bool \[2, 2\], must be bool \[16, 24\]"):
        tx.update(draw(0), state, params, masks=bad)
    numbers = masks | {"a": {"kernel": jnp.ones((16, 24)), "bias": True}}
    with pytest.raises(ValueError, match=r"a/kernel: float32"):
        tx.update(draw(0), state, params, masks=numbers)
    with pytest.raises(ValueError, match="a/kernel: no mask, so all 384 weights are kept"):
        tx.update(draw(0), state, params, masks={"b": masks["b"]})
    with pytest.raises(ValueError, match="`params` is missing"):
        tx.update(draw(0), state, masks=masks)
    with pytest.raises(ValueError, match="a/kernel: packed, but without a mask"):
        jaxprune.get_room(state)
    for room in (-0.1, float("inf"), float("nan"), True):
        with pytest.raises(ValueError, match="`room` must be a fraction"):
            jaxprune.resize_state(state, room=room)
    large = {"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}
    with pytest.raises(ValueError, match="w: 2,147,483,648 weights"):
        jax.eval_shape(tx.init, large)


def test_channels_cannot_be_cut_from_packed_state():
    def mlp(w: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ w["in"]) @ w["out"]

    params = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
    plan = structure.find_groups(mlp, params, jnp.ones((1, 3))).plan({"in:1": np.arange(8) < 6})
    tx = jaxprune.pack_state(optax.adam(0.1))
    with pytest.raises(ValueError, match="`state` holds packed arrays"):
        structure.compact_state(plan, tx, tx.init(params), params)
    small = plan.compact(params)
    with pytest.raises(ValueError, match="`state` holds packed arrays"):
        structure.expand_state(plan, tx.init(small), tx.init(params), params)
