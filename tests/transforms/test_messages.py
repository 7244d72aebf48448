"""A wrong argument is refused where it is given, and the error says what to write instead."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import budgets, patterns, scores

PARAMS = {
    "layer1": {"kernel": jnp.arange(1.0, 33).reshape(8, 4), "bias": jnp.ones(4)},
    "layer2": {"kernel": jnp.arange(1.0, 17).reshape(4, 4), "bias": jnp.ones(4)},
}

MAKERS = {
    "agip": jaxprune.agip_transform,
    "magnitude": jaxprune.magnitude_transform,
    "saliency": jaxprune.saliency_transform,
    "random": jaxprune.random_transform,
    "set": jaxprune.set_transform,
    "rigl": jaxprune.rigl_transform,
    "straight_through": jaxprune.straight_through_transform,
    "acdc": jaxprune.acdc_transform,
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"budget": 0.3}, r"^`budget` must be a function `\(shapes, .* but is 0.3. Take one from"),
        ({"budget": "uniform"}, r"but is 'uniform'. Take one from `jaxprune.budgets`: `budgets."),
        ({"budget": budgets.global_budget}, r"but `global_budget` takes `\(floor\)`. Take one"),
        (
            {"budget": {"layer1": 1.5}},
            r"^`budget` must have one number in \[0, 1\).*\n  layer1: 1.5",
        ),
        ({"pattern": "2:4"}, r"^`pattern` must be .*patterns.n_m\(2, 4, axis=-2\)`"),
        ({"pattern": (2, 4)}, r"^`pattern` must be .*patterns.n_m\(2, 4, axis=-2\)`"),
        ({"stacked": 0}, r"^`stacked` must be a function `\(path, leaf\) -> axes`, but is 0. For"),
        ({"stacked": "layers"}, r"but is 'layers'. .*stacked=jaxprune.stacks.under\("),
    ],
)
def test_arguments_that_are_no_functions(maker, option, message):
    with pytest.raises(ValueError, match=message):
        MAKERS[maker](0.5, stop=10, **option)
    with pytest.raises(ValueError, match=message):
        jaxprune.prune(PARAMS, 0.5, **option)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("magnitude", r"but is 'magnitude'. Write `score=jaxprune.scores.magnitude`.$"),
        ("taylor", r"Write `score=jaxprune.scores.taylor`.$"),
        (3, r"^`score` must be a function `\(params, statistics\) -> scores`, but is 3. Write"),
        (scores.random, r"but `random` takes `\(seed\)`. Write `score=jaxprune.scores.random\(0\)"),
        (lambda params: params, r"but `<lambda>` takes `\(params\)`"),
    ],
)
def test_scores_that_are_no_functions(score, message):
    for make in (jaxprune.agip_transform, jaxprune.straight_through_transform):
        with pytest.raises(ValueError, match=message):
            make(0.5, stop=10, score=score)
    with pytest.raises(ValueError, match=message):
        jaxprune.prune(PARAMS, 0.5, score=score)


def test_rates_and_groups_that_are_none():
    with pytest.raises(ValueError, match=r"^`rate` must be a function .*but is 0.5. Write `rate="):
        jaxprune.agip_transform(0.5, stop=10, rate=0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^`groups` must be the groups that .*, but is 3"):
        jaxprune.agip_transform(0.5, stop=10, groups=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("sparsity", "rule"),
    [
        ("0.5", r"be one number, but is '0.5'.$"),
        (50, r"lie in \[0, 1\), but is 50. For 50 % write 0.5.$"),
        ({"layer1": 0.5}, r"be one number. Give the sparsities of single leaves as `budget`"),
    ],
)
def test_sparsities_that_are_no_fractions(sparsity, rule):
    with pytest.raises(ValueError, match=f"`sparsity` must {rule}"):
        jaxprune.prune(PARAMS, sparsity)


@pytest.mark.parametrize("members", [[[optax.sgd(0.1)]], [optax.sgd]])
def test_members_of_a_chain_that_are_no_transformations(members):
    with pytest.raises(ValueError, match=r"^`transforms` must be Optax transformations.*\n  0: "):
        jaxprune.chain(*members, jaxprune.magnitude_transform(0.5, stop=0))


# ---- names


def kept(masks):
    return {layer: np.asarray(jnp.sum(own["kernel"])).item() for layer, own in masks.items()}


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_a_budget_by_name_and_prunable_by_name(maker):
    transform = MAKERS[maker](0.5, stop=2, prunable="kernel", budget={"layer1": 0.75})
    optimizer = jaxprune.chain(optax.sgd(0.01), transform)
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(3):
        updates, state = optimizer.update(PARAMS, state, params)
        params = optax.apply_updates(params, updates)
    assert kept(jaxprune.get_masks(state)) == {"layer1": 8, "layer2": 8}


def test_a_budget_by_name_follows_the_ramp():
    budget = {"layer1": 0.75, "layer2": 0.25}
    transform = jaxprune.magnitude_transform(
        lambda step: 0.1 * step, every=1, stop=5, budget=budget, prunable="*kernel"
    )
    state, seen = transform.init(PARAMS), []
    for _ in range(6):
        _, state = transform.update(PARAMS, state, PARAMS)
        seen.append(kept(jaxprune.get_masks(state)))
    # round(size * final * step / 5)
    assert [row["layer1"] for row in seen] == [32 - gone for gone in (0, 5, 10, 14, 19, 24)]
    assert [row["layer2"] for row in seen] == [16 - gone for gone in (0, 1, 2, 2, 3, 4)]


def test_a_budget_of_channels_by_the_names_of_groups():
    def mlp(w, x):
        hidden = jax.nn.relu(x @ w["layer1"]["kernel"]) @ w["layer2"]["kernel"]
        return jax.nn.relu(hidden) @ w["head"]

    params = {"layer1": PARAMS["layer1"], "layer2": PARAMS["layer2"], "head": jnp.ones((4, 2))}
    params = jax.tree.map(lambda leaf: leaf, params)
    params = {k: ({"kernel": v["kernel"]} if isinstance(v, dict) else v) for k, v in params.items()}
    groups = jaxprune.structure.find_groups(mlp, params, jnp.ones((1, 8)))
    budget = {"layer1": 0.75, "layer2/kernel": 0.25}
    transform = jaxprune.agip_transform(0.5, stop=0, groups=groups, budget=budget)
    _, state = transform.update(params, transform.init(params), params)
    widths = {name: int(own.sum()) for name, own in state.channels.items()}
    assert widths == {"layer1/kernel:1": 1, "layer2/kernel:1": 3}


def test_a_name_of_a_leaf_with_a_different_pattern_is_known():
    def pattern(path, leaf):
        return patterns.channels(-1) if "layer1" in path else None

    _, masks = jaxprune.prune(PARAMS, 0.5, pattern=pattern, budget={"layer1": 0.75, "layer2": 0.25})
    assert kept(masks) == {"layer1": 8, "layer2": 12}


def test_a_budget_of_an_n_m_leaf_is_refused():
    def pattern(path, leaf):
        return patterns.n_m(2, 4, axis=-2) if "layer1" in path else None

    rule = r"^`budget` must not name leaves with an N:M pattern(.|\n)*\n  layer1: layer1/kernel$"
    for budget in ({"layer1": 0.75, "layer2": 0.5}, budgets.named({"layer1": 0.75})):
        with pytest.raises(ValueError, match=rule):
            jaxprune.prune(PARAMS, 0.5, pattern=pattern, budget=budget)
    # A name that means others as well is for these.
    _, masks = jaxprune.prune(PARAMS, 0.5, pattern=pattern, budget={"kernel": 0.75})
    assert kept(masks) == {"layer1": 16, "layer2": 4}


@pytest.mark.parametrize("kind", [np.float32, np.float64, jnp.float32, np.array, jnp.array])
def test_a_budget_of_arrays_is_the_decimal_that_was_meant(kind):
    kernel = {"a": {"kernel": jnp.arange(50.0).reshape(5, 10)}, "b": jnp.ones((2, 2))}
    for budget in ({"a": kind(0.29)}, budgets.custom({"a": kind(0.29)})):
        masks = jaxprune.prune(kernel, 0.29, budget=budget, prunable=["a"])[1]
        assert int(masks["a"]["kernel"].sum()) == 35  # float32 has no 0.29, which gives 36


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.array([0.5]), "array([0.5])"),
        (np.nan, "nan"),
        (True, "True"),
        ("0.5", "'0.5'"),
        (None, "None"),
        (jnp.float32(1.5), "Array(1.5, dtype=float32)"),
    ],
)
def test_a_budget_of_other_values_is_refused(value, said):
    with pytest.raises(ValueError) as error:
        jaxprune.prune(PARAMS, 0.5, budget={"layer1": value, "layer2": 0.5})
    assert str(error.value) == (
        f"`budget` must have one number in [0, 1) for each name; change these:\n  layer1: {said}"
    )


def test_a_budget_that_is_traced_is_refused():
    with pytest.raises(ValueError, match=r"\n  layer1: traced, but weights are counted before the"):
        jax.jit(lambda s: jaxprune.prune(PARAMS, 0.5, budget={"layer1": s}))(0.5)


# ---- whole modules


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("chain", [jaxprune.chain, optax.chain])
def test_update_takes_a_whole_module(maker, chain):
    model = eqx.nn.Sequential(
        [
            eqx.nn.Linear(4, 8, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Dropout(0.5, inference=True),
            eqx.nn.Linear(8, 2, key=jax.random.key(1)),
        ]
    )
    arrays = eqx.filter(model, eqx.is_inexact_array)
    optimizer = chain(optax.adamw(0.1), MAKERS[maker](0.5, stop=0))
    state = optimizer.init(arrays)
    gradients = jax.tree.map(jnp.ones_like, arrays)
    updates, new = optimizer.update(gradients, state, model)
    wanted, same = optimizer.update(gradients, state, arrays)
    for ours, theirs in ((updates, wanted), (new, same)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    trained = eqx.apply_updates(model, updates)
    assert jaxprune.check(trained, new).ok
    assert trained(jnp.ones(4)).shape == (2,)


@pytest.mark.slow
def test_init_says_how_to_take_arrays_out_of_a_module():
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    optimizer = jaxprune.chain(optax.adam(0.1), jaxprune.magnitude_transform(0.5, stop=0))
    with pytest.raises(ValueError, match=r"equinox.filter\(module, .*\n  activation: custom_jvp"):
        optimizer.init(model)
