"""What the transformations accept as numbers, parameters and states, and what their errors say."""

import inspect
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from tests.support.combinations import in_turn
from tests.transforms.test_contract import (
    INNER,
    STEPS,
    TRANSFORMS,
    WINDOW,
    agip,
    expected_counts,
    inputs,
    kept,
    kernels,
    make_params,
    make_step,
)

METHODS = {
    name: getattr(jaxprune, name)
    for name in jaxprune.__all__
    if name.endswith("_transform") and name != "fixed_mask_transform"
}
STATIC = ("sparsity", "every", "start", "stop", "regrow", "drop", "seed")


def masks_after(tx: Any, steps: int = 4) -> Any:
    params = make_params()
    step, state = jax.jit(make_step(tx)), tx.init(params)
    for i in range(steps):
        params, state = step(params, state, inputs(i))
    return jaxprune.get_masks(state)


# ---- numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [jnp.float32(0.72), np.float32(0.72), np.array(0.72), jnp.array(0.72)]
)
def test_an_array_with_one_number_is_the_decimal_that_was_meant(number: Any) -> None:
    for name, method in METHODS.items():
        states = [method(s, **WINDOW).init(make_params()) for s in (number, 0.72)]
        chex.assert_trees_all_equal(*states)
        del name
    expected = jaxprune.prune(make_params(), 0.72)[1]
    chex.assert_trees_all_equal(jaxprune.prune(make_params(), number)[1], expected)
    # float32 has no 0.29: 29 of 100 weights would become 28.
    kernel = {"kernel": jnp.arange(50.0).reshape(5, 10)}
    for sparsity in (0.29, np.float32(0.29)):
        masks = jaxprune.prune(kernel, sparsity, budget=jaxprune.budgets.uniform)[1]
        assert int(masks["kernel"].sum()) == 35


def test_whole_numbers_may_be_floats() -> None:
    tx = jaxprune.magnitude_transform(0.5, every=2.0, start=np.int64(1), stop=jnp.array(6.0))
    chex.assert_trees_all_equal(masks_after(tx), masks_after(jaxprune.magnitude_transform(
        0.5, every=2, start=1, stop=6)))  # fmt: skip
    assert int(jaxprune.magnitude_transform(0.5, stop=1e5).init(make_params()).mask_updates) == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "every": ({"every": 2.5, "stop": 9}, "`every` must be a whole number, but is 2.5"),
    "stop": ({"stop": float("nan")}, "`stop` must be a whole number, but is nan"),
    "text": ({"stop": "9"}, "`stop` must be one number, but is '9'"),
    "late": ({"stop": 3e9}, "`stop` must be at most 2147483647"),
    "two": ({"sparsity": np.array([0.1, 0.2]), "stop": 9}, "`sparsity` must be one number, but is"),
    "none": ({"sparsity": None, "stop": 9}, "`sparsity` must be one number, but is None"),
    "complex": ({"sparsity": np.complex64(0.5), "stop": 9}, "`sparsity` must be one number"),
    "range": ({"sparsity": 1.5, "stop": 9}, r"`sparsity`.* must lie in \[0, 1\)"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("method", METHODS)
def test_other_numbers_are_refused(method: str, case: str) -> None:
    options, match = WRONG[case]
    with pytest.raises(ValueError, match=f"(?s){match}"):
        METHODS[method](**({"sparsity": 0.5} | options))


def test_all_problems_are_in_one_error() -> None:
    with pytest.raises(ValueError) as error:
        jaxprune.rigl_transform(1.5, every=0, start=-1, stop=2.5, drop=2.0)
    lines = str(error.value).splitlines()
    assert [line.split("`")[1] for line in lines[1:]] == [
        "stop", "every", "start", "sparsity", "drop"]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_traced_numbers_are_refused_in_our_words(method: str) -> None:
    def init(sparsity: Any) -> Any:
        return METHODS[method](sparsity, **WINDOW).init(make_params())

    with pytest.raises(ValueError, match="`sparsity` must be known before the first step"):
        jax.jit(init)(0.5)
    with pytest.raises(ValueError, match="`stop` must be known before the first step"):
        jax.jit(lambda stop: METHODS[method](0.5, stop=stop).init(make_params()))(9)
    with pytest.raises(ValueError, match="`sparsity` must be known before the first step"):
        jax.jit(lambda s: jaxprune.prune(make_params(), s))(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_inject_hyperparams_around_pruning_needs_static_arguments(method: str) -> None:
    named = [name for name in STATIC if name in inspect.signature(METHODS[method]).parameters]
    injected = optax.inject_hyperparams(METHODS[method], static_args=named)(0.5, **WINDOW)
    plain = METHODS[method](0.5, **WINDOW)
    chex.assert_trees_all_equal(masks_after(injected), masks_after(plain))
    without = optax.inject_hyperparams(METHODS[method])(0.5, **WINDOW)
    with pytest.raises(ValueError, match=r"(?s)`stop` must be known.*`static_args`"):
        masks_after(without)


def test_no_default_is_a_function() -> None:
    # `optax.inject_hyperparams` takes every function for a schedule, and calls it with the step.
    for name in [*METHODS, "fixed_mask_transform"]:
        parameters = inspect.signature(getattr(jaxprune, name)).parameters.values()
        assert not [p.name for p in parameters if p.default is not p.empty and callable(p.default)]


def test_a_decay_may_be_traced() -> None:
    def masks(decay: Any) -> Any:
        tx = agip(decay=decay)
        params = make_params()
        return jaxprune.get_masks(tx.update(params, tx.init(params), params)[1])

    assert jax.eval_shape(masks, 0.9)["a"]["kernel"].shape == (8, 16)
    with pytest.raises(ValueError, match=r"`decay` must lie in \[0, 1\) or be None, but is 1.5"):
        agip(decay=1.5)
    with pytest.raises(ValueError, match="`dtype` must be a floating-point type, but is "):
        agip(dtype=jnp.ones(2))


# ---- parameters


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_init_takes_shapes(transform: str) -> None:
    tx = INNER["momentum"](TRANSFORMS[transform]())
    shapes = jax.eval_shape(make_params)
    got, wanted = tx.init(shapes), jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_equal_structs(got, wanted)


# ---- states


@pytest.mark.parametrize("transform", ["default", "straight_through_transform", "channels"])
def test_the_state_of_another_method_is_refused(transform: str) -> None:
    params = make_params()
    tx = TRANSFORMS[transform]()
    for other in (jaxprune.magnitude_transform(0.5, stop=1), jaxprune.fixed_mask_transform()):
        with pytest.raises(ValueError, match=r"`state` must be the \w+ that .*but is \w*MaskState"):
            tx.update(params, other.init(params), params)
    with pytest.raises(ValueError, match="`state` must be .*, but is dict"):
        tx.update(params, flax.serialization.to_state_dict(tx.init(params)), params)


@pytest.mark.parametrize("transform", ["default", "fixed_mask_transform", "channels"])
def test_a_state_restored_without_a_target_says_so(transform: str) -> None:
    params = make_params()
    tx = INNER["momentum"](TRANSFORMS[transform]())
    restored = flax.serialization.to_state_dict(tx.init(params))  # as Orbax gives it, too
    with pytest.raises(ValueError, match="plain dicts, as after a restore without a target"):
        jaxprune.get_masks(restored)
    state = flax.serialization.from_state_dict(tx.init(params), restored)
    chex.assert_trees_all_equal(jaxprune.get_masks(state), jaxprune.get_masks(tx.init(params)))
    # A parameter of that name is no mask, and an optimizer without pruning has none.
    plain = optax.sgd(0.1, momentum=0.9).init({"masks": jnp.ones(2)})
    with pytest.raises(ValueError, match="without a pruning transformation"):
        jaxprune.get_masks(plain)


# ---- types of eight bits and less

NARROW = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e3m4", "float4_e2m1fn"]
ROWS = ["default", "rate by statistic", "everything", "blocks, regrowth", "rigl_transform"]
ROWS += ["straight_through_transform", "acdc_transform", "fixed_mask_transform", "channels"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "dtype", "of_updates"),
    [*in_turn(ROWS, NARROW, ["float32", "bfloat16", "float8_e5m2"]),
     ("default", "float8_e4m3fn", "float8_e4m3fn"),
     ("rate by density", "float8_e4m3fn", "float8_e4m3fn")],
)  # fmt: skip
def test_weights_of_eight_bits_with_wider_gradients(
    transform: str, dtype: str, of_updates: str
) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), make_params())
    tx = TRANSFORMS[transform]()
    state = tx.init(params)
    update = jax.jit(tx.update)
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for i in range(STEPS):
        gradients = jax.tree.map(
            lambda leaf, i=i: (jnp.cos(leaf.astype("float32") + i) / 2).astype(of_updates), params
        )
        updates, state = update(gradients, state, params)
        # optax.apply_updates adds, and JAX adds no types of eight bits to others.
        params = jax.tree.map(
            lambda p, u: (p.astype("float32") + u.astype("float32")).astype(dtype), params, updates
        )
        masks = jaxprune.get_masks(state)
        for weight, mask in zip(kernels(params), kernels(masks), strict=True):
            np.testing.assert_array_equal(weight.astype(np.float32)[~mask], 0)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
    assert kept(masks) == expected_counts(transform)[-1]


def test_a_type_without_0_is_not_pruned() -> None:
    params = make_params() | {"scales": jnp.ones((4, 4), "float8_e8m0fnu")}
    masks = jaxprune.prune(params, 0.5)[1]
    assert masks["scales"].all() and not masks["a"]["kernel"].all()
    with pytest.raises(ValueError, match=r"(?s)has the number 0.*scales: .*float8_e8m0fnu"):
        jaxprune.prune(params, 0.5, prunable=lambda path, leaf: path == "scales")


# ---- the last step that is counted


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform", ["default", "rate by statistic", "rigl_transform", "channels"]
)
def test_counters_stop_at_the_last_number(transform: str) -> None:
    last = np.iinfo(np.int32).max
    tx, params = TRANSFORMS[transform](), make_params()
    gradients = jax.tree.map(jnp.cos, params)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(gradients, state, params)
    ages = {
        name: jnp.full_like(age, last) for name, age in getattr(state, "channel_age", {}).items()
    }
    fields = {"prune_step": jnp.int32(last)} | ({"channel_age": ages} if ages else {})
    # Every mask update is overdue, so that the statistics of the last step are read.
    updates, state = tx.update(gradients, state._replace(**fields), params)
    assert int(state.prune_step) == last and int(state.mask_updates) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    if "gradient_average" in state._fields:
        expected = np.abs(np.asarray(params["a"]["kernel"] * state.gradient_average["a"]["kernel"]))
        own = np.asarray(jaxprune.get_masks(state)["a"]["kernel"])
        assert expected[own].mean() > expected[~own].mean()
