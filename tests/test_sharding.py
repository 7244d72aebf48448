"""Whole transformations on a mesh of 8 devices: the masks of one device, and nothing gathered."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import patterns

SPECS = {
    "dense": ((64, 48), P("x", "y")),
    "conv": ((3, 3, 32, 16), P(None, None, "x", "y")),
    "narrow": ((16, 20), P("x", "y")),  # 10 columns a device: no whole bytes of packed bits
    "bias": ((16,), P()),
}
WINDOW = {"every": 2, "start": 0, "stop": 4}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "agip": ("agip", {}),
    "agip, regrowth": ("agip", {"regrow": 0.3}),
    "agip, no average": ("agip", {"decay": None}),
    "magnitude": ("magnitude", {}),
    "magnitude, 2:4": ("magnitude", {"pattern": patterns.n_m(2, 4, axis=-2), "budget": None}),
    "magnitude, blocks": ("magnitude", {"pattern": patterns.blocks((4, 2))}),
    "saliency": ("saliency", {}),
    "random": ("random", {}),
    "set": ("set", {}),
    "rigl": ("rigl", {}),
    "straight_through": ("straight_through", {}),
    "acdc": ("acdc", {}),
}


def make(name: str) -> optax.GradientTransformation:
    method, options = METHODS[name]
    transform = getattr(jaxprune, f"{method}_transform")(0.5, **(WINDOW | options))
    return jaxprune.chain(optax.sgd(0.1, momentum=0.9), transform)


def draw(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    # Few different values: ties are cut, too.
    return {
        name: np.round(random.standard_normal(shape), 1).astype(np.float32)
        for name, (shape, _) in SPECS.items()
    }


def gathered(program: str) -> list[int]:
    """Number of entries of each array that a compiled program gathers."""
    results = re.findall(r"= (\S.*?) all-gather(?:-start)?\(", program)
    shapes = [shape for result in results for shape in re.findall(r"\[([\d,]*)\]", result)]
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_sharded_parameters_get_the_masks_of_one_device_and_are_never_gathered(name: str) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shardings = {key: NamedSharding(mesh, spec) for key, (_, spec) in SPECS.items()}
    tx = make(name)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, draw(0))
    placed = jax.device_put(params, shardings)
    state, placed_state = tx.init(params), jax.jit(tx.init)(placed)
    one = jax.jit(step)
    compiled = jax.jit(step).lower(placed, placed_state, placed).compile()
    assert max(gathered(compiled.as_text()), default=0) < 16 * 20
    many = jax.jit(step)
    for i in range(6):
        gradients = draw(i + 1)
        params, state = one(params, state, gradients)
        placed, placed_state = many(placed, placed_state, jax.device_put(gradients, shardings))
        for key, mask in jaxprune.get_masks(placed_state).items():
            np.testing.assert_array_equal(mask, jaxprune.get_masks(state)[key])
    for key, leaf in placed.items():
        np.testing.assert_allclose(leaf, params[key], rtol=1e-6)
        if key != "bias":
            assert placed_state[-1].masks[key].sharding.is_equivalent_to(shardings[key], leaf.ndim)


def test_a_gathered_parameter_would_be_seen() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    placed = jax.device_put(draw(0)["dense"], NamedSharding(mesh, P("x", "y")))
    program = jax.jit(lambda x: jnp.sort(x.reshape(-1))).lower(placed).compile().as_text()
    assert max(gathered(program)) >= 64 * 48
