"""jaxprune.chain: what the members before pruning see and keep, and what it refuses."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import budgets
from tests.support.combinations import in_turn

contrib = optax.contrib
SHAPES = {"a": (16, 24), "b": (24, 16)}
NORMS = {
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    "lars": lambda: optax.lars(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "muon": lambda: contrib.muon(0.1),
    "normalize_by_update_norm": lambda: optax.chain(
        optax.normalize_by_update_norm(), optax.sgd(0.1)
    ),
}


def draw(seed: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    tree = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    return {k: jnp.asarray(v, jnp.float32) for k, v in tree.items()} | {"bias": jnp.ones(16)}


def steps_of(tx: Any, steps: int, params: Any = None) -> list[tuple[Any, Any]]:
    """Parameters and states before and after each step on random gradients."""
    params = draw(100) if params is None else params
    found = [(params, tx.init(params))]
    update = jax.jit(tx.update)
    for step in range(steps):
        params, state = found[-1]
        updates, state = update(draw(step), state, params)
        found.append((optax.apply_updates(params, updates), state))
    return found


def pruned_entries(tree: Any, masks: Any) -> np.ndarray:
    return np.concatenate([np.asarray(tree[name])[~np.asarray(masks[name])] for name in SHAPES])


# ---- norms


METHODS = ["fixed masks", "magnitude", "agip"]
FIRST = {*in_turn(NORMS, METHODS), *(("clip_by_global_norm", method) for method in METHODS)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), sorted(FIRST))
def test_the_first_step_is_that_of_the_sparse_network(name: str, method: str) -> None:
    sparse, masks = jaxprune.prune(draw(100), 0.95, budget=budgets.uniform)
    options: dict[str, Any] = {"stop": 0, "budget": budgets.uniform}
    prune, inner = {
        "fixed masks": (jaxprune.fixed_mask_transform(masks), None),
        "magnitude": (jaxprune.magnitude_transform(0.95, **options), None),
        "agip": (
            jaxprune.agip_transform(0.95, score=jaxprune.scores.magnitude, **options),
            "sparse",
        ),
    }[method]
    gradients = draw(0)
    tx = jaxprune.chain(NORMS[name](), prune, inner=inner)
    params = sparse if method == "fixed masks" else draw(100)
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    got = optax.apply_updates(params, updates)
    for leaf in SHAPES:
        np.testing.assert_array_equal(jaxprune.get_masks(state)[leaf], masks[leaf])

    plain = NORMS[name]()
    masked = jaxprune.apply_masks(gradients, masks)  # of the loss with masks inside
    updates, _ = jax.jit(plain.update)(masked, plain.init(sparse), sparse)
    wanted = jaxprune.apply_masks(optax.apply_updates(sparse, updates), masks)
    for leaf, weights in wanted.items():
        np.testing.assert_allclose(got[leaf], weights, rtol=1e-5, atol=1e-6, err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "sparse"),
    [("magnitude", True), ("random", True), ("saliency", True), ("set", True), ("rigl", True),
     ("acdc", True), ("agip", False), ("straight_through", False)],
)  # fmt: skip
@pytest.mark.parametrize("inner", [None, "sparse", "dense"])
def test_what_the_members_before_see(method: str, sparse: bool, inner: Any) -> None:
    prune = getattr(jaxprune, f"{method}_transform")(0.5, stop=0)
    tx = jaxprune.chain(optax.trace(0.9), prune, inner=inner)
    if method == "straight_through" and inner == "sparse":
        with pytest.raises(ValueError, match=r'(?s)`inner="sparse"` hides.*StraightThroughState'):
            tx.init(draw(100))
        return
    params, state = steps_of(tx, 1)[-1]
    masks = jaxprune.get_masks(state)
    momentum = pruned_entries(state[0].trace, masks)
    assert (momentum == 0).all() == (inner == "sparse" or (inner is None and sparse))
    assert (pruned_entries(params, masks) == 0).all()


def test_inner_is_one_of_three_and_a_momentum_cannot_be_hidden() -> None:
    with pytest.raises(ValueError, match='`inner` must be None, "sparse" or "dense", but is 1'):
        jaxprune.chain(optax.sgd(0.1), inner=1)  # pyright: ignore[reportArgumentType]
    blind = jaxprune.agip_transform(0.5, stop=1, decay=None)
    with pytest.raises(ValueError, match=r"(?s)AgipState"):
        jaxprune.chain(optax.sgd(0.1, momentum=0.9), blind, inner="sparse").init(draw(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), in_turn(["lamb", "muon", "clip_by_global_norm"], ["magnitude", "rigl"])
)
def test_sparsity_0_is_the_plain_optimizer_behind_norms_too(name: str, method: str) -> None:
    prune = getattr(jaxprune, f"{method}_transform")(0.0, stop=1)
    got = steps_of(jaxprune.chain(NORMS[name](), prune), 3)[-1][0]
    wanted = steps_of(NORMS[name](), 3)[-1][0]
    for leaf, weights in wanted.items():
        np.testing.assert_array_equal(got[leaf], weights)


# ---- moments

STARTS = {
    "adagrad": (optax.adagrad(0.1), "sum_of_squares", 0.1),
    "rprop": (optax.rprop(0.01), "step_sizes", 0.01),
    "rmsprop": (optax.rmsprop(0.1, initial_scale=1.0), "nu", 0.9),  # times the decay
    "cocob": (contrib.cocob(), "scale", 1e-8),
    "adam": (optax.adam(0.1), "nu", 0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), in_turn(STARTS, ["set", "rigl"]))
def test_moments_go_back_to_what_init_gives(name: str, method: str) -> None:
    member, field, value = STARTS[name]
    prune = getattr(jaxprune, f"{method}_transform")(0.5, every=1, stop=9, drop=0.4)
    for params, state in steps_of(jaxprune.chain(member, prune), 4)[1:]:
        masks = jaxprune.get_masks(state)
        np.testing.assert_allclose(
            pruned_entries(optax.tree.get(state[0], field), masks), value, rtol=1e-6
        )
        assert all(np.isfinite(leaf).all() for leaf in params.values())


@pytest.mark.slow
def test_a_history_of_weights_starts_again_too() -> None:
    prune = jaxprune.rigl_transform(0.5, every=1, stop=9, drop=0.4)
    tx = jaxprune.chain(optax.scale_by_lbfgs(memory_size=3), optax.scale(-0.01), prune)
    _, state = steps_of(tx, 4)[-1]
    masks = jaxprune.get_masks(state)
    memory = optax.tree.get(state, "diff_updates_memory")
    for index in range(3):
        entries = jax.tree.map(lambda leaf, i=index: leaf[i], memory)
        np.testing.assert_array_equal(pruned_entries(entries, masks), 0.0)
    assert float(optax.tree.norm(memory)) > 0


SGD = functools.partial(optax.sgd, momentum=0.9)
FLAGS = {"a": True, "b": True, "bias": False}
NESTED = {
    "masked": lambda prune: (SGD(0.1), optax.masked(prune, FLAGS)),
    "partition": lambda prune: (
        SGD(0.1),
        optax.partition(
            {True: prune, False: optax.identity()}, lambda params: {k: FLAGS[k] for k in params}
        ),
    ),
    "partition with its optimizers": lambda prune: (
        optax.identity(),
        optax.partition(
            {True: jaxprune.chain(SGD(0.1), prune), False: SGD(0.1)},
            lambda params: {k: FLAGS[k] for k in params},
        ),
    ),
    "named_chain": lambda prune: (optax.named_chain(("sgd", SGD(0.1)), ("prune", prune)),),
    "names that sort the other way": lambda prune: (
        optax.named_chain(("sgd", SGD(0.1)), ("a", prune)),
    ),
    "optax.chain": lambda prune: (optax.chain(SGD(0.1), prune),),
    "inject_hyperparams": lambda prune: (
        optax.inject_hyperparams(lambda rate: optax.chain(SGD(rate), prune))(rate=0.1),
    ),
}


@functools.cache
def beside(method: str) -> tuple[Any, list[tuple[Any, Any]]]:
    """A transformation, and four steps with it in a chain without wrappers."""
    prune = getattr(jaxprune, f"{method}_transform")(0.5, every=1, stop=9, drop=0.4)
    return prune, steps_of(jaxprune.chain(SGD(0.1), prune), 4)


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "method"), in_turn(NESTED, ["set", "rigl"]))
def test_pruning_inside_of_wrappers_is_pruning_beside_them(wrapper: str, method: str) -> None:
    prune, flat = beside(method)
    nested = steps_of(jaxprune.chain(*NESTED[wrapper](prune)), 4)
    for (params, state), (wanted, wanted_state) in zip(nested[1:], flat[1:], strict=True):
        masks = jaxprune.get_masks(state)
        for leaf in SHAPES:
            np.testing.assert_array_equal(masks[leaf], jaxprune.get_masks(wanted_state)[leaf])
            np.testing.assert_allclose(params[leaf], wanted[leaf], rtol=1e-6)
        found = {}  # the momentum of a partition lies in several trees
        for tree in jaxprune.trees.state_fields(state, "trace"):
            found |= jaxprune.trees.leaf_by_path(tree)
        np.testing.assert_array_equal(pruned_entries(found, masks), 0.0)


@pytest.mark.slow
def test_two_pruning_transformations_in_one_chain() -> None:
    options: dict[str, Any] = {"every": 1, "stop": 9, "drop": 0.4}
    one = jaxprune.set_transform(0.5, prunable=lambda path, leaf: path == "a", **options)
    two = jaxprune.rigl_transform(0.5, prunable=lambda path, leaf: path == "b", **options)
    regrown, before = 0, None
    for params, state in steps_of(jaxprune.chain(SGD(0.1), one, two), 4):
        masks = jaxprune.get_masks(state)
        kept = {name: np.asarray(masks[name]) for name in SHAPES}
        if before is not None:
            np.testing.assert_array_equal(pruned_entries(params, kept), 0.0)
            np.testing.assert_array_equal(pruned_entries(optax.tree.get(state, "trace"), kept), 0)
            regrown += sum(int((kept[name] & ~before[name]).sum()) for name in SHAPES)
        before = kept
    assert regrown > 10


# ---- line searches


def quadratic(params: Any) -> jax.Array:
    targets = draw(7)
    return sum(jnp.sum((params[name] - targets[name]) ** 4) for name in params)  # pyright: ignore


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "agip", "rigl"])
def test_a_line_search_goes_on_from_the_masked_point(method: str) -> None:
    prune = getattr(jaxprune, f"{method}_transform")(0.8, every=1, start=1, stop=3)
    tx = jaxprune.chain(optax.lbfgs(linesearch=optax.scale_by_zoom_linesearch(6)), prune)
    evaluate = optax.value_and_grad_from_state(quadratic)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grad = evaluate(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=quadratic)
        return optax.apply_updates(params, updates), state, value, grad

    params = draw(100)
    state = tx.init(params)
    for _ in range(5):
        right = jax.value_and_grad(quadratic)(params)
        params, state, *seen = step(params, state)
        for got, wanted in zip(jax.tree.leaves(seen), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    assert (pruned_entries(params, jaxprune.get_masks(state)) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "agip", "straight_through", "fixed"])
def test_a_line_search_in_a_plain_chain_is_refused(method: str) -> None:
    _, masks = jaxprune.prune(draw(100), 0.5)
    prune = (
        jaxprune.fixed_mask_transform(masks)
        if method == "fixed"
        else getattr(jaxprune, f"{method}_transform")(0.5, stop=1)
    )
    tx = optax.chain(optax.lbfgs(), prune)
    params = draw(100)
    extra = {"value": quadratic(params), "grad": draw(0), "value_fn": quadratic}
    with pytest.raises(ValueError, match=r"`value_fn`.*`jaxprune.chain\(optax.lbfgs"):
        tx.update(draw(0), tx.init(params), params, **extra)


# ---- order and wrappers


PRUNE = jaxprune.magnitude_transform(0.5, stop=0)
REFUSED = {
    "scale": ((optax.sgd(0.1), PRUNE, optax.scale(0.5)), ["`state[2]` follows"]),
    "two": ((PRUNE, optax.apply_every(2), optax.scale(0.5)), ["`state[1]`", "`state[2]`"]),
    "between": ((PRUNE, optax.scale(0.5), PRUNE), ["`state[1]` follows the pruning of `state[0]`"]),
    "optax.chain": (
        (optax.sgd(0.1), optax.chain(PRUNE, contrib.reduce_on_plateau())),
        ["`state[1][1]` follows the pruning of `state[1][0]`"],
    ),
    "named_chain": (
        (optax.named_chain(("z", PRUNE), ("a", optax.scale(0.5))),),
        ["`state[0]['a']` follows the pruning of `state[0]['z']`"],
    ),
    "schedule_free": (
        (contrib.schedule_free(optax.chain(optax.sgd(0.1), PRUNE), 0.1),),
        ["`state[0]`: ScheduleFree mixes"],
    ),
    "mechanize": (
        (optax.clip(1.0), contrib.mechanize(optax.chain(optax.sgd(0.1), PRUNE))),
        ["`state[1]`: Mechanic mixes"],
    ),
    "sam": (
        (contrib.sam(optax.chain(optax.sgd(0.1), PRUNE), optax.sgd(0.1)),),
        ["`state[0]`: SAM mixes"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pruning_must_have_the_last_word(name: str) -> None:
    members, lines = REFUSED[name]
    with pytest.raises(ValueError, match="pruning must come last in a") as error:
        jaxprune.chain(*members).init(draw(100))
    assert all(line in str(error.value) for line in lines), str(error.value)
    with pytest.raises(ValueError, match="pruning must come last in a"):
        state = tuple(member.init(draw(100)) for member in members)
        jaxprune.chain(*members).update(draw(0), state, draw(100))


def test_a_counter_beside_a_state_is_no_transformation() -> None:
    def counting(inner: Any) -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> Any:
            updates, own = inner.update(updates, state[0], params)
            return updates, (own, state[1] + 1)

        return optax.GradientTransformation(
            lambda params: (inner.init(params), jnp.zeros([], jnp.int32)), update
        )

    params, state = steps_of(jaxprune.chain(SGD(0.1), counting(PRUNE)), 2)[-1]
    assert (pruned_entries(params, jaxprune.get_masks(state)) == 0).all()


def test_two_copies_of_the_parameters_are_not_ranked_together() -> None:
    pair = optax.LookaheadParams.init_synced(draw(100))
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), pair)
    for prune in (PRUNE, jaxprune.agip_transform(0.72, stop=1), jaxprune.fixed_mask_transform(),
                  jaxprune.fixed_mask_transform(masks),
                  jaxprune.straight_through_transform(0.5, stop=1)):  # fmt: skip
        with pytest.raises(ValueError, match="`params` are LookaheadParams"):
            optax.chain(optax.lookahead(optax.sgd(0.1), 5, 0.5), prune).init(pair)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["sam", "lookahead"])
def test_masks_that_became_numbers_are_bools_when_read_and_refused_when_used(wrapper: str) -> None:
    inside = jaxprune.chain(optax.sgd(0.1), PRUNE)
    params: Any = draw(100)
    if wrapper == "sam":
        tx = contrib.sam(inside, optax.sgd(0.1))
    else:
        tx = optax.lookahead(inside, 2, 0.5, reset_state=True)
        params = optax.LookaheadParams.init_synced(params)
    _, state = tx.update(draw(0), tx.init(params), params)
    assert optax.tree.get(state, "masks")["a"].dtype == jnp.int32
    masks = jaxprune.get_masks(state)
    assert {name: mask.dtype for name, mask in masks.items()} == dict.fromkeys(masks, bool)
    assert int((~masks["a"]).sum()) == int(masks["a"].size - masks["a"].sum())
    with pytest.raises(ValueError, match=r"(?s)`state` must hold bool masks.*a: int32"):
        tx.update(draw(1), state, params)


# ---- decay=None


@pytest.mark.slow
def test_without_an_average_each_leaf_needs_one_momentum() -> None:
    agip = functools.partial(jaxprune.agip_transform, 0.5, stop=0, decay=None)

    def update(*members: Any) -> Any:
        tx = jaxprune.chain(*members)
        return tx.update(draw(0), tx.init(draw(100)), draw(100))

    with pytest.raises(ValueError, match=r"(?s)`decay=0.99`.*\n  a: momenta in .* and .*\n  b: "):
        update(optax.trace(0.9), optax.scale_by_adam(), agip())
    with pytest.raises(ValueError, match=r"(?s)exactly one.*\n  a: no momentum\n  b: no momentum"):
        update(optax.rmsprop(0.1), agip())
    only_a = optax.masked(optax.trace(0.9), {"a": True, "b": False, "bias": False})
    with pytest.raises(ValueError, match=r"(?s):\n  b: no momentum$"):
        update(only_a, agip())
    labels = {"a": "adam", "b": "sgd", "bias": "sgd"}
    optimizers = optax.partition({"adam": optax.adam(0.1), "sgd": SGD(0.1)}, labels)
    _, state = update(optimizers, agip(budget=budgets.uniform))
    for leaf, weights in draw(100).items():
        score = np.abs(np.asarray(weights * draw(0)[leaf])).ravel()
        if leaf in SHAPES:
            kept = np.sort(np.argsort(-score)[: score.size // 2])
            mask = np.asarray(jaxprune.get_masks(state)[leaf]).ravel()
            np.testing.assert_array_equal(np.flatnonzero(mask), kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda *pair: optax.chain(pair[0], jaxprune.chain(pair[1])),
        lambda *pair: optax.chain(pair[0], jaxprune.chain(optax.identity(), pair[1])),
        lambda *pair: optax.named_chain(("search", pair[0]), ("prune", jaxprune.chain(pair[1]))),
    ],
)
def test_a_line_search_around_the_chain_is_refused(wrap):
    params = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3)}

    def value_fn(params):
        return jnp.sum(params["kernel"] ** 2)

    tx = wrap(optax.lbfgs(), jaxprune.magnitude_transform(0.5, stop=0))
    extra = {"value": value_fn(params), "grad": params, "value_fn": value_fn}
    with pytest.raises(ValueError, match="`value_fn` is passed .* no line search is before it"):
        tx.update(params, tx.init(params), params, **extra)


# ---- frozen leaves

FROZEN = {"a": jnp.arange(1.0, 65.0).reshape(8, 8), "c": jnp.arange(1.0, 65.0).reshape(8, 8)}
FREEZERS = {
    "set_to_zero": lambda: optax.partition(
        {"t": optax.sgd(0.1), "f": optax.set_to_zero()}, {"a": "f", "c": "t"}
    ),
    "freeze": lambda: optax.chain(optax.freeze({"a": True, "c": False}), optax.adam(0.1)),
    "freeze last": lambda: optax.chain(
        optax.sgd(0.1, momentum=0.9), optax.freeze({"a": True, "c": False})
    ),
}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("freezer", FREEZERS)
def test_frozen_leaves_behind_which_pruning_comes_are_named(freezer, jit):
    tx = jaxprune.chain(FREEZERS[freezer](), jaxprune.magnitude_transform(0.8, stop=2))
    init = jax.jit(tx.init) if jit else tx.init
    with pytest.warns(UserWarning, match="does not change a, but pruning would .*to 0. Prune"):
        init(FROZEN)


@pytest.mark.parametrize("freezer", FREEZERS)
def test_frozen_leaves_that_are_not_pruned_are_fine(freezer):
    only = jaxprune.magnitude_transform(0.8, stop=2, prunable=lambda path, leaf: path == "c")
    jaxprune.chain(FREEZERS[freezer](), only).init(FROZEN)
    parts = {
        "t": jaxprune.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.8, stop=0)),
        "f": optax.set_to_zero(),
    }
    tx = optax.partition(parts, {"a": "f", "c": "t"})
    state = tx.init(FROZEN)
    updates, state = tx.update(FROZEN, state, FROZEN)
    assert not updates["a"].any()
    masks = jaxprune.get_masks(state)
    assert bool(masks["a"]) and int(masks["c"].sum()) == 13


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(0.1, mask={"a": True, "c": False}),
        optax.masked(optax.clip(1.0), {"a": True, "c": False}),
        optax.partition({"t": optax.sgd(0.0), "f": optax.sgd(0.0)}, {"a": "f", "c": "t"}),
    ],
)
def test_parts_that_train_are_not_taken_for_frozen(optimizer):
    jaxprune.chain(optimizer, jaxprune.magnitude_transform(0.8, stop=2)).init(FROZEN)
