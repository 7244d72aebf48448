"""Memory and time of optimizer state of kept weights only (`jaxprune.pack_state`), for Adam.

    python benchmarks/packed_state.py [--sizes 1000000 10000000] [--rounds 10]

Bytes are those of a ResNet-50 in shapes alone, whose kernels all have the same density; the masks,
which both kinds of state need, are not counted. Times are processor time of `tx.update` and
`optax.apply_updates`, jitted and donated, in rounds in which every arm runs once; the ratio is the
median within a round. What a step holds besides its arguments is read from the compiled program:
gradients and updates stay dense.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxprune
from jaxprune import models

DENSITIES = (0.5, 0.2, 0.1)


def shapes() -> Any:
    """The parameters of a ResNet-50, as shapes."""
    model = nnx.eval_shape(lambda: models.resnet50(rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(params: Any, density: float | None) -> int:
    """Bytes of the state of Adam: dense if the density is None."""
    adam = optax.adam(1e-3)
    tx = adam if density is None else jaxprune.pack_state(adam, density=density)
    return tree_bytes(jax.eval_shape(tx.init, params))


def parameters(size: int) -> Any:
    """Random square kernels with about so many weights in all."""
    side = max(2, round((size / 4) ** 0.5))
    random = np.random.default_rng(0)
    return {
        f"layer{i}": {"kernel": jnp.asarray(random.standard_normal((side, side)), jnp.float32)}
        for i in range(4)
    }


def arm(params: Any, density: float, packed: bool) -> tuple[Callable[..., Any], Any]:
    """A compiled step and its state."""
    _, masks = jaxprune.prune(params, 1 - density)
    adam = optax.adam(1e-3)
    inner = jaxprune.pack_state(adam) if packed else adam
    tx = jaxprune.chain(inner, jaxprune.fixed_mask_transform(masks))
    state = tx.init(params)
    if packed:
        state = jaxprune.resize_state(state)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    return jitted.lower(params, state, params).compile(), jax.tree.map(jnp.copy, state)


def measure(size: int, density: float, rounds: int) -> dict[str, Any]:
    """Processor time of a step with packed state over that with dense state."""
    params = parameters(size)
    gradients = jax.tree.map(lambda x: 0.01 * x, params)
    arms = [arm(params, density, packed) for packed in (False, True)]
    runs = [[jax.tree.map(jnp.copy, params), state] for _, state in arms]
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 2):
        for own, (step, _) in enumerate(arms):
            clock = time.process_time()
            runs[own] = list(jax.block_until_ready(step(*runs[own], gradients)))
            if number >= 2:  # the first one packs
                seconds[own].append(time.process_time() - clock)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    dense, packed = (step.memory_analysis().temp_size_in_bytes for step, _ in arms)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {
        "weights": weights,
        "density": density,
        "dense_ms": 1e3 * statistics.median(seconds[0]),
        "packed_ms": 1e3 * statistics.median(seconds[1]),
        "ratio": statistics.median(ratios),
        "dense_besides": dense / weights,
        "packed_besides": packed / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    params = shapes()
    dense = state_bytes(params, None)
    rows = [
        {"density": density, "MB": own / 1e6, "of dense": own / dense}
        for density in arguments.densities
        for own in [state_bytes(params, density)]
    ]
    print(f"State of Adam for a ResNet-50: {dense / 1e6:.1f} MB dense\n")
    print(jaxprune.reports.table(rows, list(rows[0])))
    records = [
        measure(size, density, arguments.rounds)
        for size in arguments.sizes
        for density in arguments.densities
    ]
    print("\nA step; `besides` is temporary memory in bytes per weight\n")
    print(jaxprune.reports.table(records, list(records[0])))


if __name__ == "__main__":
    main()
