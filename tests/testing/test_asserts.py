"""Assertions about masks: they pass where a statement holds, and else say where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import testing

MASK = {"a": {"w": np.array([[True, False], [False, True]])}, "b": jnp.bool_(True)}
PARAMS = {"a": {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}, "b": jnp.ones(3)}


def test_masked_weights_of_a_training_pass() -> None:
    params, masks = jaxprune.prune({"w": jnp.arange(8.0).reshape(2, 4)}, 0.5)
    testing.assert_masked(params, masks)
    testing.assert_sparsity(masks, 0.5)


@pytest.mark.parametrize("value", [1e-30, np.nan, np.inf])
def test_a_masked_weight_that_is_not_zero_is_shown(value: float) -> None:
    wrong = PARAMS | {"a": {"w": PARAMS["a"]["w"].at[1, 0].set(value)}}
    with pytest.raises(AssertionError, match=rf"a/w: 1 of 2, first {value} at \[1, 0\]"):
        testing.assert_masked(wrong, MASK)


def test_negative_zero_is_zero_and_scalars_are_masks_of_leaves() -> None:
    testing.assert_masked({"a": {"w": -0.0 * PARAMS["a"]["w"]}, "b": jnp.ones(3)}, MASK)
    with pytest.raises(AssertionError, match=r"b: 3 of 3, first 1.0 at \[0\]"):
        testing.assert_masked(PARAMS, MASK | {"b": jnp.bool_(False)})


def test_masks_of_other_parameters_are_an_error_of_the_test() -> None:
    with pytest.raises(ValueError, match="`masks` must fit the parameters"):
        testing.assert_masked(PARAMS, {"a": {"w": np.ones((2, 3), bool)}, "b": True})


def test_at_most_nine_leaves_are_listed() -> None:
    params, masks = ({str(i): fill for i in range(12)} for fill in (jnp.ones(2), np.zeros(2, bool)))
    with pytest.raises(AssertionError, match="and 3 more") as error:
        testing.assert_masked(params, masks)
    assert len(str(error.value).splitlines()) == 11


def test_sparsity_is_an_exact_count_over_all_leaves_or_of_each() -> None:
    masks = {"x": np.arange(10) < 3, "y": np.arange(10) < 1, "z": np.bool_(True)}
    testing.assert_sparsity(masks, 0.8)
    testing.assert_sparsity(masks, {"x": 0.7, "y": 0.9})
    testing.assert_sparsity(masks, 0.75, tolerance=1)
    with pytest.raises(AssertionError, match=r"keeps 4 of 20 \(sparsity 0.8\), not 5 \(0.75\)"):
        testing.assert_sparsity(masks, 0.75)
    with pytest.raises(AssertionError, match=r"x: keeps 3 of 10 \(sparsity 0.7\), not 1"):
        testing.assert_sparsity(masks, {"x": 0.9})
    with pytest.raises(ValueError, match=r"these are x, y. Unknown:\n  z"):
        testing.assert_sparsity(masks, {"z": 0.5})
    with pytest.raises(ValueError, match="at least one array"):
        testing.assert_sparsity({"z": np.bool_(True)}, 0.5)


def test_leaves_that_are_not_pruned_do_not_count() -> None:
    params = {
        "kernel": jnp.arange(16.0).reshape(4, 4),
        "bias": jnp.ones(4),
        "kept": jnp.ones((2, 2)),
    }
    masks = jaxprune.prune(params, 0.75, prunable=["kernel"])[1]
    assert masks["bias"].shape == (4,)
    testing.assert_sparsity(masks, {"kernel": 0.75})
    with pytest.raises(AssertionError, match="keeps 8 of 20"):  # kernels are pruned by default
        testing.assert_sparsity(masks, 0.75)
    testing.assert_sparsity(masks, 0.75, prunable=["kernel"])


def test_nested_and_same_masks() -> None:
    fewer = {"a": {"w": np.array([[True, False], [False, False]])}, "b": jnp.bool_(True)}
    testing.assert_nested(MASK, fewer)
    testing.assert_nested(MASK, MASK)
    testing.assert_same_masks(MASK, MASK)
    with pytest.raises(AssertionError, match=r"come back:\n  a/w: 1 of 4, first at \[1, 1\]"):
        testing.assert_nested(fewer, MASK)
    with pytest.raises(AssertionError, match=r"differ:\n  a/w: 1 of 4, first at \[1, 1\]"):
        testing.assert_same_masks(fewer, MASK)
    with pytest.raises(ValueError, match="b: only in one"):
        testing.assert_same_masks(MASK, {"a": MASK["a"]})
    with pytest.raises(
        ValueError, match=r"same paths and shapes, .*\n  a/w: \(2, 2\) and \(2, 3\)"
    ):
        testing.assert_same_masks(MASK, MASK | {"b": np.ones(3, bool), "a": {"w": np.ones((2, 3))}})


@pytest.mark.parametrize(
    ("second", "seen"),
    [
        (np.ones(4, np.float32), r"0/0: float32\[3\] at first, float32\[4\] now"),
        (np.ones(3, np.int32), r"0/0: float32\[3\] at first, int32\[3\] now"),
        (
            {"x": np.ones(3, np.float32)},
            "0/0: float32.* at first, absent now\n  0/0/x: absent at first",
        ),
    ],
)
def test_a_second_trace_says_what_changed(second: object, seen: str) -> None:
    step = jax.jit(testing.traced_once(lambda x: jax.tree.map(jnp.sin, x)))
    step(jnp.ones(3, jnp.float32))
    step(jnp.zeros(3, jnp.float32))
    with pytest.raises(AssertionError, match=seen):
        step(second)


def test_a_new_jit_in_every_step_is_named_as_a_cause() -> None:
    @testing.traced_once
    def double(x: jax.Array) -> jax.Array:
        """Doubles."""
        return 2 * x

    assert double.__doc__ == "Doubles."
    jax.jit(lambda x: double(x))(jnp.ones(3))
    with pytest.raises(AssertionError, match=r"a new `jax.jit` in every step"):
        jax.jit(lambda x: double(x))(jnp.ones(3))


def test_weak_types_are_told_apart() -> None:
    step = jax.jit(testing.traced_once(lambda x: x + 1))
    step(1.0)
    dtype = jnp.result_type(float)  # float64 with 64-bit numbers
    with pytest.raises(AssertionError, match=rf"{dtype}\[\]\* at first, {dtype}\[\] now"):
        step(jnp.asarray(1.0, dtype))
