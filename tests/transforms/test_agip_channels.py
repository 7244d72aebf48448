"""AGIP on channels: exact counts, exact zeros, and the same training with the channels removed."""

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
from jaxprune import budgets, scores, structure
from jaxprune.transforms._gates import Gate, lengths, root_mean_square
from tests.support.checks import draw
from tests.support.combinations import in_turn

STEPS = 12
WINDOW = {"every": 2, "start": 1, "stop": 7}  # mask updates at 1, 3, 5 and 7


def net(params, x):
    """Two hidden layers, the first with a norm; their names are not in the order of their use."""
    hidden = x @ params["b"]["kernel"]
    hidden = (hidden - hidden.mean(0, keepdims=True)) / (hidden.std(0, keepdims=True) + 1e-3)
    hidden = jax.nn.relu(hidden * params["norm"]["scale"][None] + params["norm"]["bias"][None])
    hidden = jax.nn.relu(hidden @ params["a"]["kernel"] + params["a"]["offset"][None])
    return hidden @ params["c"]["kernel"]


PARAMS = {
    "b": {"kernel": draw(6, 10)},
    "norm": {"scale": 1 + 0.3 * draw(10), "bias": 0.3 * draw(10, seed=1)},
    "a": {"kernel": draw(10, 8) / 3, "offset": 0.3 * draw(8)},
    "c": {"kernel": draw(8, 3) / 3},
}
X, Y = draw(32, 6), draw(32, 3)
GROUPS = structure.find_groups(net, PARAMS, X)
NORMED, PLAIN = "b/kernel:1", "a/kernel:1"
assert list(GROUPS) == [NORMED, PLAIN], "JAX would sort these names: a dict of them is not in order"


def agip(sparsity=0.5, groups=GROUPS, **options):
    return jaxprune.agip_transform(sparsity, groups=groups, **(WINDOW | options))


def loss(function, params):
    return jnp.mean((function(params, X) - Y) ** 2)


def trained(optimizer, steps=STEPS, function=net, params=PARAMS, state=None):
    """All (params, state) of a training, jitted once."""
    state, traces = optimizer.init(params) if state is None else state, []

    @jax.jit
    def step(params, state):
        traces.append(True)
        grads = jax.grad(functools.partial(loss, function))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
        yield params, state
    assert len(traces) == 1


INNER = {
    "momentum": lambda prune: jaxprune.chain(optax.sgd(0.05, momentum=0.9), prune),
    "optax.chain": lambda prune: optax.chain(optax.sgd(0.05, momentum=0.9), prune),
    "adamw": lambda prune: jaxprune.chain(optax.adamw(0.01, weight_decay=0.1), prune),
    "decay": lambda prune: jaxprune.chain(
        optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9), prune
    ),
    "MultiSteps": lambda prune: optax.MultiSteps(
        jaxprune.chain(optax.sgd(0.05, momentum=0.9), prune), 1
    ),
}
OPTIONS = {
    "default": {},
    "no average": {"decay": None},
    "regrowth": {"regrow": 0.4},
    "global": {"budget": budgets.global_budget()},
    "magnitude": {"score": scores.magnitude},
    "random": {"score": scores.random(3)},
}


def off(state):
    """Group -> channels that are off; from the masks of the gates."""
    masks = jaxprune.get_masks(state)
    return {
        NORMED: ~masks["norm"]["scale"],
        PLAIN: ~masks["a"]["offset"],
    }


CASES = [(name, "default") for name in INNER] + [("momentum", name) for name in OPTIONS][1:]


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "option"), CASES)
def test_counts_and_zeros_are_exact(inner, option):
    optimizer = INNER[inner](agip(**OPTIONS[option]))
    ramp = dict(
        zip((1, 3, 5, 7), jaxprune.timetables.sparsities_at(0.5, (1, 3, 5, 7)), strict=True)
    )
    sparsity = 0.0
    for number, (params, state) in enumerate(trained(optimizer)):
        sparsity = ramp.get(number, sparsity)
        masked, masks = off(state), jaxprune.get_masks(state)
        counts = {name: int(own.sum()) for name, own in masked.items()}
        if option == "global":
            assert sum(counts.values()) == 18 - budgets.keep_count(18, sparsity)
            assert counts[NORMED] < 10 and counts[PLAIN] < 8
        else:
            assert counts[NORMED] == 10 - budgets.keep_count(10, sparsity)
            assert counts[PLAIN] == 8 - budgets.keep_count(8, sparsity)
        for name in ("scale", "bias"):
            assert (params["norm"][name][masked[NORMED]] == 0).all()
            np.testing.assert_array_equal(masks["norm"][name], ~masked[NORMED])
        assert (params["a"]["offset"][masked[PLAIN]] == 0).all()
        assert (params["a"]["kernel"][:, masked[PLAIN]] == 0).all()
        assert masks["b"]["kernel"].ndim == 0, "a norm is enough; its kernel goes on learning"


def test_sparsity_zero_gives_the_updates_of_the_plain_optimizer():
    plain, ours = optax.sgd(0.05, momentum=0.9), INNER["momentum"](agip(0.0))
    states = plain.init(PARAMS), ours.init(PARAMS)
    for _ in range(3):
        grads = jax.jit(jax.grad(functools.partial(loss, net)))(PARAMS)
        expected, plain_state = jax.jit(plain.update)(grads, states[0], PARAMS)
        updates, state = jax.jit(ours.update)(grads, states[1], PARAMS)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
        states = plain_state, state


@pytest.mark.slow
def test_the_statistic_is_the_root_of_the_mean_squared_taylor_term_at_the_gates():
    decay, expected, params = 0.8, np.zeros(10), PARAMS
    optimizer = INNER["momentum"](agip(decay=decay, start=50, stop=50))
    state = None
    for new, state in trained(optimizer, 4):  # noqa: B007
        grads = jax.grad(functools.partial(loss, net))(params)["norm"]
        term = sum(np.asarray(params["norm"][n] * grads[n], float) for n in ("scale", "bias"))
        expected, params = decay * expected + (1 - decay) * term**2, new
    (average,) = jaxprune.trees.state_fields(state, "channel_average")
    np.testing.assert_allclose(average[NORMED], np.sqrt(expected), rtol=1e-4)


def test_the_lowest_statistics_go():
    optimizer = INNER["momentum"](agip(start=3, stop=3))
    *_, (_, before), (_, after) = trained(optimizer, 4)
    (average,) = jaxprune.trees.state_fields(after, "channel_average")
    assert not off(before)[NORMED].any()
    lowest = np.argsort(np.asarray(average[NORMED]), kind="stable")[:5]
    assert sorted(lowest) == sorted(np.flatnonzero(off(after)[NORMED]))


def test_a_channel_comes_back_and_learns_again():
    optimizer = INNER["momentum"](agip(regrow=0.4, every=2, start=1, stop=9))
    back = 0
    steps = list(trained(optimizer, 12))
    for (old, a), (new, b) in zip(steps, steps[1:], strict=False):
        returned = np.flatnonzero(off(a)[NORMED] & ~off(b)[NORMED])
        back += len(returned)
        (age,) = jaxprune.trees.state_fields(b, "channel_age")
        for channel in returned:
            assert old["norm"]["scale"][channel] == 0 != new["norm"]["scale"][channel]
            assert age[NORMED][channel] == 0
    assert back, "nothing came back"


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_refused():
    optimizer = jaxprune.chain(optax.sgd(0.1), agip(start=1, stop=1))
    state, params = optimizer.init(PARAMS), PARAMS
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    bad = ones | {"norm": {"scale": ones["norm"]["scale"].at[2].set(jnp.nan), "bias": jnp.ones(10)}}
    refused = []
    for grads in (ones, bad, ones):
        updates, state = optimizer.update(grads, state, params)
        refused.append([int(x) for x in jaxprune.trees.state_fields(state, "refused")][0])
        counts = int(off(state)[NORMED].sum())
    assert refused == [0, 1, 1] and counts == 5
    (average,) = jaxprune.trees.state_fields(state, "channel_average")
    assert np.isfinite(average[NORMED]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inner", "multiple"), [("momentum", 1), ("momentum", 4), ("adamw", 4), ("decay", 1)]
)
def test_training_goes_on_the_same_without_the_channels(inner, multiple):
    make = INNER[inner]
    dense = list(trained(make(agip())))
    params, state = dense[4]  # two more mask updates are to come
    kept = {name: ~own for name, own in off(state).items()}
    plan = GROUPS.plan({name: np.asarray(own) for name, own in kept.items()}, multiple=multiple)
    groups = GROUPS.compact(plan)
    assert groups[NORMED].size < 10
    optimizer = make(agip(groups=groups))
    small, done = (
        plan.compact(params),
        structure.compact_state(plan, optimizer, state, params, groups=GROUPS),
    )
    assert done.restarted == ()
    after = trained(optimizer, STEPS - 5, plan.wrap(net), small, done.state)
    for (params, state), (small, small_state) in zip(dense[5:], after, strict=True):
        chex.assert_trees_all_close(small, plan.compact(params), rtol=1e-4, atol=1e-5)
        for name, own in off(state).items():
            left = plan.channels(GROUPS[name])
            np.testing.assert_array_equal(off(small_state)[name], own[left])


def test_the_state_is_vectors():
    state = agip(regrow=0.2).init({"params": PARAMS}["params"])
    floats = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32]
    assert sorted(leaf.shape for leaf in floats) == [(8,), (8,), (10,), (10,)]


def test_paths_of_the_variables_may_be_longer():
    groups = structure.find_groups(lambda v, x: net(v["params"], x), {"params": PARAMS}, X)
    (one,) = {tuple(sorted(group.size for group in groups.values()))}
    assert one == (8, 10)
    *_, (params, state) = trained(INNER["momentum"](agip(groups=groups)))
    assert off(state)[NORMED].sum() == 5 and (params["norm"]["scale"] == 0).sum() == 5


def test_groups_of_another_model():
    other = {"a": PARAMS["a"], "norm": {"scale": jnp.ones(7)}, "b": PARAMS["b"], "c": PARAMS["c"]}
    with pytest.raises(ValueError, match="`groups` must belong to the model") as error:
        agip().init(other)
    assert "norm/scale: shape (7,), must have 10 along axis 0" in str(error.value)
    assert "norm/bias: missing" in str(error.value)


def test_options_of_weights_are_refused():
    with pytest.raises(ValueError, match="`pattern` applies to weights and must be None with"):
        agip(pattern=jaxprune.patterns.channels(axis=-1))


def test_every_group_keeps_a_channel():
    *_, (_, state) = trained(INNER["momentum"](agip(0.97)))
    assert {name: int((~own).sum()) for name, own in off(state).items()} == {NORMED: 1, PLAIN: 1}


# ---- which channels are kept, against NumPy


def layers(names, widths, seed=0):
    """Kernels of an MLP under these names, in the order of their use, and the MLP."""
    sizes = zip(widths, widths[1:], strict=False)
    kernels = [draw(*size, seed=seed + i) for i, size in enumerate(sizes)]

    def mlp(params, x):
        for i, name in enumerate(names):
            x = x @ params[name]
            x = jax.nn.relu(x) if i < len(names) - 1 else x
        return x

    return dict(zip(names, kernels, strict=True)), mlp


def kept_at_once(params, grads, mlp, **options):
    """Layer -> channels that are kept after one mask update on all that `grads` says."""
    width = params[next(iter(params))].shape[0]
    groups = structure.find_groups(mlp, params, jnp.ones((2, width)))
    prune = agip(groups=groups, **({"start": 0, "stop": 0} | options))
    optimizer = jaxprune.chain(optax.trace(0.9), prune)
    state = optimizer.init(params)
    state = jax.jit(optimizer.update)(grads, state, params)[1]
    (channels,) = jaxprune.trees.state_fields(state, "channels")
    (unranked,) = jaxprune.trees.state_fields(state, "unranked")
    kept = {name.partition(":")[0]: np.asarray(own) for name, own in channels.items()}
    return kept, int(unranked)


def largest(scores, count):
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:count]] = True
    return kept


def numpy_scores(params, grads, of_norms):
    """Float64, for each layer but the last: its columns are the gates."""
    arrays = {n: (np.asarray(w, float), np.asarray(grads[n], float)) for n, w in params.items()}
    if of_norms:
        return {name: np.sqrt((w**2).sum(0)) for name, (w, _) in arrays.items()}
    return {name: np.abs((w * g).sum(0)) for name, (w, g) in arrays.items()}


NAMES = st.one_of(
    st.permutations(["a", "b", "c", "d"]),
    st.permutations(["9", "10", "2", "11"]),
    st.permutations([2, 10, 9, 11]),  # keys of NNX lists: JAX sorts them as numbers, paths as text
    st.lists(st.text("ab0_", min_size=1, max_size=3), min_size=4, max_size=4, unique=True),
)
RULES = {
    "default": {},
    "no average": {"decay": None},
    "magnitude": {"score": scores.magnitude},
    "global": {"budget": budgets.global_budget()},
}


@pytest.mark.slow
@settings(max_examples=8)
@given(names=NAMES, rule=st.sampled_from(list(RULES)), seed=st.integers(0, 99))
def test_each_group_is_ranked_by_its_own_statistics(names, rule, seed):
    names, widths = list(names), (3, 8, 6, 10, 2)
    params, mlp = layers(names, widths, seed)
    grads = {name: draw(*kernel.shape, seed=seed + 50) for name, kernel in params.items()}
    found, unranked = kept_at_once(params, grads, mlp, **RULES[rule])
    expected = numpy_scores(params, grads, rule == "magnitude")
    hidden = names[:-1]
    if rule == "global":
        flat = np.concatenate([expected[name] for name in hidden])
        kept = dict(zip(hidden, np.split(largest(flat, 12), [8, 14]), strict=True))
        if not all(own.any() for own in kept.values()):
            return  # a floor has to hold as well
    else:
        kept = {name: largest(expected[name], len(expected[name]) // 2) for name in hidden}
    assert unranked == 0 and found.keys() == {str(name) for name in hidden}
    for name in hidden:
        np.testing.assert_array_equal(found[str(name)], kept[name], err_msg=f"{name} of {names}")


@pytest.mark.slow
def test_regrowth_and_floors_do_not_depend_on_the_names():
    """Widths, budgets, what is dropped and what comes back belong to layers, not to positions."""
    options = {"regrow": 0.5, "every": 1, "start": 0, "stop": 3, "budget": budgets.erdos_renyi}

    def run(names):
        params, mlp = layers(names, (3, 9, 12, 4))
        groups = structure.find_groups(mlp, params, jnp.ones((2, 3)))
        assert (list(groups) == sorted(groups)) == (names[0] == "a")
        optimizer = jaxprune.chain(optax.sgd(0.1, momentum=0.9), agip(0.4, groups, **options))

        @jax.jit
        def step(params, state, _=None):
            grads = jax.grad(lambda params: jnp.mean(mlp(params, X[:, :3]) ** 2))(params)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        for _ in range(3):
            params, state = step(params, state)
        (channels,) = jaxprune.trees.state_fields(state, "channels")
        return [channels[f"{name}:1"].tolist() for name in names[:-1]]

    expected = run(["a", "b", "c"])
    assert run(["b", "a", "c"]) == expected and run([10, 9, 2]) == expected


@pytest.mark.slow
def test_three_layers_whose_names_are_not_in_order():
    """Channels that hardly count are the last eight of b and the first eight of a."""

    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    half = jnp.where(jnp.arange(16) < 8, 1, 1e-3)
    params = {
        "b": normal(0, 8, 16) * half[None],
        "a": normal(1, 16, 16) * half[None, ::-1],
        "c": normal(2, 16, 4),
    }
    x, y = normal(3, 64, 8), normal(4, 64, 4)

    def apply(params, x):
        return jax.nn.relu(jax.nn.relu(x @ params["b"]) @ params["a"]) @ params["c"]

    groups = structure.find_groups(apply, params, x)
    assert list(groups) == ["b:1", "a:1"]
    optimizer = jaxprune.chain(optax.sgd(1e-3), agip(groups=groups))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: jnp.mean((apply(params, x) - y) ** 2))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(8):
        params, state = step(params, state)
    (channels,) = jaxprune.trees.state_fields(state, "channels")
    first = {name: int(own[:8].sum()) for name, own in channels.items()}
    assert first["b:1"] == 8 and first["a:1"] <= 1


# ---- small and large numbers


SCALES = [(0, -60), (-60, 0), (-120, 0), (40, 30)]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "scales"), in_turn(RULES, SCALES) + in_turn(RULES, SCALES[::-1]))
def test_scaled_networks_are_ranked_as_they_are(rule, scales):
    """Gradients of 1e-18, weights of 1e-18 and 1e-36, and products above 1e19: no square fits."""
    weight, gradient = scales
    params, mlp = layers(["b", "a", "c"], (3, 8, 6, 2))
    grads = {name: draw(*kernel.shape, seed=50) for name, kernel in params.items()}
    plain, _ = kept_at_once(params, grads, mlp, **RULES[rule])
    small = {name: kernel * 2.0**weight for name, kernel in params.items()}
    slight = {name: own * 2.0**gradient for name, own in grads.items()}
    scaled, unranked = kept_at_once(small, slight, mlp, **RULES[rule])
    assert unranked == 0
    for name, own in plain.items():
        np.testing.assert_array_equal(scaled[name], own, err_msg=name)
        assert own[: len(own) // 2].sum() < len(own) // 2, "the first by index say nothing"


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6),
    st.integers(-120, 120),
    st.sampled_from([0.0, 0.5, 0.99, 0.999]),
)
def test_a_root_mean_square_of_any_scale(values, exponent, decay):
    average, expected = jnp.zeros(2), np.zeros(2)
    for value in values:
        new = np.array([value, 0.5], np.float32)
        average = root_mean_square(average, jnp.asarray(new * np.float32(2.0**exponent)), decay)
        expected = decay * expected + (1 - decay) * new.astype(float) ** 2
    found = np.asarray(average, float) / 2.0**exponent
    np.testing.assert_allclose(found, np.sqrt(expected), rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_does_not_enter_a_root_mean_square():
    old = jnp.array([1.0, 1.0, 1.0, 3.0])
    new = root_mean_square(old, jnp.array([jnp.nan, jnp.inf, 1.0, 4.0]), 0.5)
    np.testing.assert_allclose(new, [1, 1, 1, np.sqrt(12.5)], rtol=1e-6)


def test_norms_of_small_and_large_entries():
    """Also of gates of which several entries belong to a channel, or none."""
    gates = [Gate(0, 1, np.array([0, 1, 2])), Gate(1, 0, np.array([2, -1, 0, 2]))]
    arrays = [draw(5, 3), draw(4)]
    expected = np.zeros(3)
    for gate, array in zip(gates, arrays, strict=True):
        rows = np.moveaxis(np.asarray(array, float), gate.axis, 0).reshape(len(gate.channels), -1)
        for channel, row in zip(gate.channels, rows, strict=True):
            expected[channel] += (row**2).sum() if channel >= 0 else 0
    for exponent in (-120, -60, 0, 60, 120):
        scaled = [array * 2.0**exponent for array in arrays]
        found = np.asarray(lengths(gates, 3, scaled), float) / 2.0**exponent
        np.testing.assert_allclose(found, np.sqrt(expected), rtol=1e-5)
    assert np.isnan(lengths(gates, 3, [arrays[0].at[0, 1].set(jnp.inf), arrays[1]])[1])


# ---- what has not moved yet


@pytest.mark.slow
def test_gates_that_are_zero_are_ranked_by_their_gradients():
    """As in AdaLN-zero, or LoRA's second factor: a gate starts at 0, and so does |w g|."""
    params, mlp = layers(["b", "a", "c"], (3, 8, 8, 2))
    grads = {name: draw(*kernel.shape, seed=50) for name, kernel in params.items()}
    params["b"] = jnp.zeros_like(params["b"])
    for rule in ("default", "no average", "magnitude"):
        with pytest.warns(UserWarning, match="the gates of b:1 are all 0"):
            found, unranked = kept_at_once(params, grads, mlp, **RULES[rule])
        slopes = np.linalg.norm(np.asarray(grads["b"], float), axis=0)
        np.testing.assert_array_equal(found["b"], largest(slopes, 4))
        expected = numpy_scores(params, grads, rule == "magnitude")["a"]
        np.testing.assert_array_equal(found["a"], largest(expected, 4))
        assert unranked == 1


def test_a_group_without_statistics_is_as_good_as_the_mean_of_the_others():
    """In a global ranking it was cut to its floor; its gates may be frozen, or not have moved."""
    params, mlp = layers(["b", "a", "c"], (3, 8, 8, 2))
    grads = {name: draw(*kernel.shape, seed=50) for name, kernel in params.items()}
    grads["a"] = jnp.zeros_like(grads["a"])  # frozen: its norms are what is known
    found, unranked = kept_at_once(params, grads, mlp, budget=budgets.global_budget(0.0))
    known = numpy_scores(params, grads, of_norms=False)["b"]
    norms = np.linalg.norm(np.asarray(params["a"], float), axis=0)
    order = largest(np.concatenate([known, norms / norms.mean() * known.mean()]), 8)
    np.testing.assert_array_equal(np.concatenate([found["b"], found["a"]]), order)
    assert unranked == 1 and found["a"].sum() >= 3


def test_a_network_without_any_statistic_keeps_its_longest_channels():
    params, mlp = layers(["b", "a", "c"], (3, 8, 8, 2))
    grads = jax.tree.map(jnp.zeros_like, params)
    found, unranked = kept_at_once(params, grads, mlp)
    for name, own in numpy_scores(params, grads, of_norms=True).items():
        if name in found:
            np.testing.assert_array_equal(found[name], largest(own, 4))
    assert unranked == 2


def test_gates_of_the_same_name_in_two_folders():
    """The gates of `z/norm` are not those of the leaf `norm` beside it."""
    params = {
        "norm": {"scale": 2 * jnp.ones(6)},
        "z": {"kernel": draw(4, 6), "norm": {"scale": 1 + draw(6) / 9}, "out": draw(6, 3)},
    }

    def apply(variables, x):
        params = variables["params"]
        hidden = x @ params["z"]["kernel"] * params["z"]["norm"]["scale"][None]
        return (hidden @ params["z"]["out"]) * jnp.cumsum(params["norm"]["scale"])[-1]

    groups = structure.find_groups(apply, {"params": params}, jnp.ones((2, 4)))
    (gate,) = [gate for group in groups.values() for gate in group.gates]
    assert gate.path == "params/z/norm/scale"
    state = agip(groups=groups).init(params)
    masks = jaxprune.get_masks(state)
    assert jnp.ndim(masks["norm"]["scale"]) == 0
    assert jnp.ndim(masks["z"]["norm"]["scale"]) == 1


@pytest.mark.parametrize("decay", [None, 0.9])
def test_optax_finds_the_masks_of_channels(decay):
    optimizer = agip(decay=decay)
    state = optimizer.init(PARAMS)
    turned = optax.tree_map_params(
        optimizer, lambda mask: ~mask, state, transform_non_params=lambda _: "other"
    )
    assert not turned.masks["norm"]["scale"].any() and state.masks["norm"]["scale"].all()
    assert turned.prune_step == "other" and turned.channels[NORMED] == "other"


def test_behind_a_relu_a_masked_channel_lives_on_its_memory():
    """The slope of relu at 0 is 0, so its average only decays from what it was."""
    decay, growth, kept = 0.8, [], []
    for _, state in trained(jaxprune.chain(optax.sgd(0.05), agip(0.5, regrow=0.2, decay=decay))):
        growth.append(np.asarray(state[-1].channel_growth[PLAIN]))
        kept.append(np.asarray(state[-1].channels[PLAIN]))
    stays_off = ~kept[7] & ~kept[8] & ~kept[11]
    assert stays_off.any()
    np.testing.assert_allclose(growth[11][stays_off], growth[8][stays_off] * decay**1.5, rtol=1e-5)
