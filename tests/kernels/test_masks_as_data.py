"""New masks: which need another program, what `update` chooses, and trainings that follow them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import kernels, schedules, trees
from jaxprune.kernels._capacities import capacity_of, still_fit
from tests.support.sparse import drawn_masks, gap, inverse

TABLE = kernels.measure_table(clock=inverse)
KEYS = jax.random.split(jax.random.key(1), 4)
X = jax.random.normal(KEYS[0], (16, 12))
Y = jax.random.normal(KEYS[1], (16, 6))


def apply(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def make_params():
    shapes = {"first": (12, 32), "second": (32, 6)}
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for (name, shape), key in zip(shapes.items(), KEYS[2:])
    }


def loss(params, x, y):
    return jnp.mean((apply(params, x) - y) ** 2)


def masks_of(density, seed=0):
    return drawn_masks(make_params(), density, seed)


# ---- capacities


@pytest.mark.parametrize("size", [1, 7, 100, 2304])
def test_there_is_room_and_never_more_than_the_layer(size):
    for count in range(0, size + 1, max(1, size // 60)):
        room = capacity_of(count, size)
        assert max(1, count) <= room <= size
        assert room <= max(2, count * 1.05 * 2 ** (1 / 8) + 1)


def test_capacities_come_in_steps():
    rooms = {capacity_of(count, 4096) for count in range(400, 4097)}
    assert len(rooms) < 30


def test_a_ramp_chooses_a_handful_of_times():
    """Ten layers of different speeds, 100 mask updates from dense to a density of 0.1."""
    sizes = {f"layer{i}": 1000 * (i + 1) for i in range(10)}
    choice, chosen = kernels.Capacities({}, sum(sizes.values())), 0
    for step in range(100):
        counts = {
            name: round(size * (0.1 + 0.9 * (1 - step / 99) ** (1 + i / 4)))
            for i, (name, size) in enumerate(sizes.items())
        }
        if not still_fit(choice, counts):
            rooms = {name: capacity_of(count, sizes[name]) for name, count in counts.items()}
            choice, chosen = kernels.Capacities(rooms, sum(counts.values())), chosen + 1
        assert all(counts[name] <= room for name, room in choice.by_layer.items())
    assert 3 <= chosen <= 8


# ---- programs


def test_new_masks_do_not_compile_while_there_is_room():
    traces = []

    @jax.jit
    def step(params, indices):
        traces.append(sorted(indices))
        return jax.value_and_grad(lambda p: (wrapped(p, X, indices=indices) ** 2).sum())(params)

    wrapped = kernels.wrap(apply, masks_of(0.2), make_params(), X, table="always")
    for seed in range(4):
        masks = masks_of(0.19, seed)
        params = jaxprune.apply_masks(make_params(), masks)
        wrapped = wrapped.update(masks)
        value, gradients = step(params, wrapped.indices)
        wanted, dense = jax.value_and_grad(lambda p: (apply(p, X) ** 2).sum())(params)
        assert gap(value, wanted) < 1e-5
        assert gap(gradients, jaxprune.apply_masks(dense, masks)) < 1e-5
    assert len(traces) == 1
    wrapped = wrapped.update(masks_of(0.05))
    step(jaxprune.apply_masks(make_params(), masks_of(0.05)), wrapped.indices)
    assert len(traces) == 2


def test_a_layer_without_room_is_chosen_again():
    wrapped = kernels.wrap(apply, masks_of(0.2), make_params(), X, table="always")
    before = wrapped.capacities.by_layer
    masks = masks_of(0.2)
    masks["first"] = np.random.default_rng(3).random((12, 32)) < 0.3
    after = wrapped.update(masks).capacities.by_layer
    assert after["first"] > before["first"] and after["second"] == before["second"]


def test_layers_are_chosen_by_the_table_and_join_when_they_pay():
    wrapped = kernels.wrap(apply, masks_of(0.5), make_params(), X, table=TABLE)
    assert not wrapped.indices
    assert str(wrapped).count("dense: does not pay at this density") == 2
    wrapped = wrapped.update(masks_of(0.25))
    assert list(wrapped.indices) == ["first", "second"]
    masks = masks_of(0.25) | {"first": np.ones((12, 32), bool)}
    assert list(wrapped.update(masks).indices) == ["second"]
    forward = kernels.wrap(apply, masks_of(0.33), make_params(), X, table=TABLE, gradients=False)
    both = kernels.wrap(apply, masks_of(0.33), make_params(), X, table=TABLE)
    assert not forward.indices and both.indices


def test_capacities_can_be_given_and_are_kept():
    wrapped = kernels.wrap(apply, masks_of(0.2), make_params(), X, table=TABLE)
    chosen = kernels.Capacities({"second": 90}, wrapped.capacities.kept)
    again = kernels.wrap(apply, masks_of(0.2), make_params(), X, table=TABLE, capacities=chosen)
    assert list(again.indices) == ["second"] and again.capacities == chosen
    assert "begins to pay; it is added when the layers are chosen again" in str(again)


def test_no_compiler_leaves_the_function_and_says_so(monkeypatch):
    from jaxprune.kernels import _wrapping

    why = "no C++ compiler is installed; install one"
    monkeypatch.setattr(_wrapping.operations, "available", lambda: why)
    for table in (None, TABLE):
        wrapped = kernels.wrap(apply, masks_of(0.1), make_params(), X, table=table)
        assert not wrapped.indices
        assert f"0 of 2 masked leaves have sparse kernels: {why}" in str(wrapped)
        assert wrapped.to_dict()["unavailable"] == why


def test_report():
    wrapped = kernels.wrap(apply, masks_of(0.25), make_params(), X, table=TABLE)
    lines = str(wrapped).splitlines()
    assert lines[0] == "2 of 2 masked leaves have sparse kernels"
    assert lines[1].split() == ["masked", "leaf", "kernel", "density", "expected", "ratio"]
    name, kernel, density, ratio = lines[3].split()
    assert (name, kernel) == ("first", "product")
    assert 0.4 / float(density) == pytest.approx(float(ratio[:-1]), rel=0.01)
    layers = wrapped.to_dict()["layers"]
    assert layers["second"]["kernel"] == "product" and layers["second"]["expected"] > 1


# ---- training


def trained(make_tx, steps, follow=None, state=None, start=0):
    """Trains with donated state; with `follow`, the steps use sparse kernels."""
    tx = make_tx()

    def step(params, opt_state, indices):
        function = lambda p: jnp.mean((wrapped(p, X, indices=indices) - Y) ** 2)  # noqa: E731
        gradients = jax.grad(function)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = make_params()
    params, opt_state = (params, tx.init(params)) if state is None else state
    masks = jaxprune.get_masks(opt_state)
    params = jaxprune.apply_masks(params, masks)  # RigL is sparse from the start
    wrapped = kernels.wrap(apply, masks, params, X, table="always" if follow else TABLE)
    following = kernels.Following(wrapped, follow or ())
    choices = []
    jitted = jax.jit(step, donate_argnums=(0, 1))
    for number in range(start, start + steps):
        indices = following.indices(number) if follow else {}
        params, opt_state = jitted(params, opt_state, indices)
        following.after(number, opt_state)
        choices.append(sorted(indices))
    return params, opt_state, choices


UPDATES = schedules.mask_update_steps(20, 120, 20)


def magnitude():
    own = jaxprune.magnitude_transform(0.8, start=20, stop=120, every=20)
    return jaxprune.chain(optax.sgd(0.05, momentum=0.9), own)


def rigl():
    own = jaxprune.rigl_transform(0.7, start=20, stop=120, every=20)
    return jaxprune.chain(optax.sgd(0.05), own)


@pytest.mark.slow
@pytest.mark.parametrize("make_tx", [magnitude, rigl])
def test_200_steps_equal_masked_dense_training(make_tx):
    """To rounding; the masks are the same, and so are the choices of what to regrow."""
    params, opt_state, choices = trained(make_tx, 200, follow=UPDATES)
    wanted, dense_state, _ = trained(make_tx, 200)
    kept, dense_kept = map(jaxprune.get_masks, (opt_state, dense_state))
    assert all(np.array_equal(kept[name], dense_kept[name]) for name in kept)
    assert gap(params, wanted) < 1e-4
    assert [step for step, own in enumerate(choices) if not own] == UPDATES
    for name, mask in kept.items():
        assert not np.any(np.asarray(params[name])[~np.asarray(mask)])


@pytest.mark.slow
def test_a_resumed_training_has_the_same_bits():
    whole, whole_state, _ = trained(magnitude, 90, follow=UPDATES)
    half = trained(magnitude, 50, follow=UPDATES)[:2]
    rest, rest_state, _ = trained(magnitude, 40, follow=UPDATES, state=half, start=50)
    pairs = zip(jax.tree.leaves((whole, whole_state)), jax.tree.leaves((rest, rest_state)))
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_a_record_leads_to_the_same_layers_and_is_checked():
    state = magnitude().init(make_params())
    wrapped = kernels.wrap(apply, masks_of(0.2), make_params(), X, table=TABLE)
    record = kernels.Following(wrapped, UPDATES).to_record()
    assert record["capacities"].keys() == {"first", "second"}
    dense = kernels.wrap(apply, jaxprune.get_masks(state), make_params(), X, table=TABLE)
    following = kernels.Following(dense, UPDATES, record=record)
    following.read(jaxprune.set_masks(state, masks_of(0.2)))
    assert following.to_record() == record and list(following.indices(1)) == ["first", "second"]
    with pytest.raises(ValueError, match="`record/kept` must be a whole number"):
        kernels.Following(dense, UPDATES, record=record | {"kept": -1})


def test_masks_change_at_the_steps_that_are_followed():
    """Which the transformation counts from 0, like `schedules.mask_update_steps`."""
    tx = rigl()
    params = make_params()
    state, before = tx.init(params), None
    changed = []
    update = jax.jit(tx.update)
    for number in range(45):
        gradients = jax.tree.map(lambda x, n=number: jnp.sin(x * 100 + n), params)
        _, state = update(gradients, state, params)
        masks = jax.device_get(jaxprune.get_masks(state))
        if before is not None and any(np.any(masks[name] != before[name]) for name in masks):
            changed.append(number)
        before = masks
    assert changed == [own for own in UPDATES if own < 45]


def test_a_refused_mask_update_keeps_the_steps_dense():
    tx, params = rigl(), make_params()
    state = tx.init(params)
    wrapped = kernels.wrap(apply, jaxprune.get_masks(state), params, X, table="always")
    following = kernels.Following(wrapped, [20, 40])
    following.read(state)
    update = jax.jit(tx.update)
    dense = []
    for number in range(25):
        value = jnp.nan if number in (20, 21) else 0.1
        dense.append(following.is_dense(number))
        _, state = update(jax.tree.map(lambda x, v=value: x * v, params), state, params)
        following.after(number, state)
    assert [number for number, own in enumerate(dense) if own] == [20, 21, 22]
    assert following.indices(24)


def test_a_training_of_scan_and_donation():
    """Steps in one `lax.scan`, with the indices as constants of the loop."""
    masks = masks_of(0.3)
    params = jaxprune.apply_masks(make_params(), masks)
    wrapped = kernels.wrap(apply, masks, params, X, table="always")

    def run(call, params):
        def one(params, _):
            gradients = jax.grad(lambda p: jnp.mean((call(p, X) - Y) ** 2))(params)
            gradients = jaxprune.apply_masks(gradients, masks)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), None

        return jax.lax.scan(one, params, length=5)[0]

    wanted = jax.jit(lambda p: run(apply, p))(params)
    found = jax.jit(
        lambda p, indices: run(lambda q, x: wrapped(q, x, indices=indices), p), donate_argnums=0
    )(jax.tree.map(jnp.copy, params), wrapped.indices)
    assert gap(found, wanted) < 1e-5


def test_indices_are_a_tree_of_arrays():
    wrapped = kernels.wrap(apply, masks_of(0.3), make_params(), X, table="always")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(wrapped.indices))
    assert set(wrapped.indices) == set(trees.leaf_by_path(make_params()))
