"""`check_transform` over every public transformation, as a user would run it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import budgets, patterns, scores, structure, testing, transforms

WINDOW = {"every": 2, "start": 1, "stop": 6}  # mask updates at 1, 3, 5 and 6 of nine steps


def numbers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


PARAMS = {
    "first": {"kernel": numbers(0, 8, 16), "bias": numbers(1, 16)},
    "second": {"kernel": numbers(2, 16, 8)},
}


def forward(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["second"]["kernel"]


EXAMPLE = testing.Example(
    PARAMS, lambda params, x: jnp.mean((forward(params, x) - 1) ** 2), lambda i: numbers(i, 8, 8)
)


def windowed(make: Callable[..., Any], **options: Any) -> Callable[[float], Any]:
    return lambda sparsity: make(sparsity, **WINDOW, **options)


def fixed(sparsity: float) -> optax.GradientTransformation:
    return jaxprune.fixed_mask_transform(jaxprune.prune(PARAMS, sparsity)[1])


def channels(sparsity: float) -> optax.GradientTransformation:
    groups = structure.find_groups(forward, PARAMS, numbers(0, 8, 8))
    return jaxprune.agip_transform(sparsity, groups=groups, **WINDOW)


# A public transformation, or what differs from its default -> how it is made for a sparsity.
METHODS = {
    "acdc_transform": windowed(jaxprune.acdc_transform),
    "agip_transform": windowed(jaxprune.agip_transform),
    "agip_transform, regrowth": windowed(jaxprune.agip_transform, regrow=0.3),
    "agip_transform, blocks": windowed(jaxprune.agip_transform, pattern=patterns.blocks((2, 2))),
    "agip_transform, channels": channels,
    "fixed_mask_transform": fixed,
    "magnitude_transform": windowed(jaxprune.magnitude_transform),
    "magnitude_transform, uniform": windowed(jaxprune.magnitude_transform, budget=budgets.uniform),
    "random_transform": windowed(jaxprune.random_transform, seed=3),
    "rigl_transform": windowed(jaxprune.rigl_transform),
    "saliency_transform": windowed(jaxprune.saliency_transform),
    "set_transform": windowed(jaxprune.set_transform, seed=3),
    "straight_through_transform": windowed(jaxprune.straight_through_transform),
    "straight_through_transform, random": windowed(
        jaxprune.straight_through_transform, score=scores.random(1)
    ),
}


def test_every_public_transformation_is_checked() -> None:
    public = {name for name in transforms.__all__ if name.endswith("_transform")}
    assert {name.partition(",")[0] for name in METHODS} == public


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_library_keeps_all_laws(name: str) -> None:
    assert jax.device_count() == 8
    results = testing.check_transform(METHODS[name], example=EXAMPLE)
    assert results == dict.fromkeys(testing.LAWS, "holds")
