"""Removes half of the channels of a convolutional network while it trains in a loop of your own.

    python examples/fewer_channels.py

`structure.Shrinking` decides after each mask update whether removal pays, compiles the smaller step
in the background, and exchanges parameters and optimizer state for smaller ones. Expected after 300
steps on handwritten digits: about 96 % of the test images with widths of 16 and 32 instead of 32
and 64, which is less than a third of the multiply-accumulates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from jaxprune import data, schedules, structure

STEPS = 300


def network(variables: Any, images: jax.Array) -> jax.Array:
    """Two convolutions of stride 2, the average over positions, and a classifier."""
    x, params = images, variables["params"]
    for name in ("first", "second"):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return x.mean((1, 2)) @ params["head"]


def init(seed: int) -> Any:
    """Random kernels."""
    normal = jax.nn.initializers.he_normal()
    shapes = {"first": (3, 3, 1, 32), "second": (3, 3, 32, 64), "head": (64, 10)}
    keys = jax.random.split(jax.random.key(seed), 3)
    return {"params": {name: normal(k, shape) for k, (name, shape) in zip(keys, shapes.items())}}


def main(steps: int = STEPS) -> dict[str, Any]:
    """Trains and tests; returns accuracy, widths and the share of the multiply-accumulates."""
    digits = data.load("digits")
    images, test_images = (
        (part.images / 255 - 0.3).astype("float32") for part in (digits.train, digits.test)
    )
    variables, first = init(0), jnp.asarray(images[:64])
    groups = structure.find_groups(network, variables, first)
    cost = structure.mac_cost(groups, network, variables, first[:1])

    def make_optimizer(stage: Any) -> Any:
        window = {"every": steps // 10, "start": steps // 10, "stop": steps // 3}
        prune = jaxprune.agip_transform(0.5, groups=stage.groups, **window)
        return jaxprune.chain(optax.adam(5e-3), prune)

    def prepare(stage: Any) -> Any:  # the training step of a stage
        apply, optimizer = stage.wrap(network), make_optimizer(stage)

        @jax.jit
        def step(variables, state, x, y):
            def loss(params):
                logits = apply({"params": params}, x)
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            params = variables["params"]
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return {"params": optax.apply_updates(params, updates)}, state

        return step

    run = structure.Shrinking(
        groups,
        steps=steps,
        mask_updates=schedules.mask_update_steps(steps // 10, steps // 3, steps // 10),
        cost=cost,
        make_optimizer=make_optimizer,
        prepare=prepare,
        functions={network: (first,)},
        policy=structure.Policy(switch_steps=5, delay=5),
    )
    run.begin()
    state, random = run.optimizer.init(variables["params"]), np.random.default_rng(0)
    for step in range(1, steps + 1):
        rows = random.integers(0, len(images), 64)
        variables, state = run.prepared(variables, state, images[rows], digits.train.labels[rows])
        variables, state = run.advance(step, variables, state)

    logits = run.stage.wrap(network)(variables, test_images)
    accuracy = float(jnp.mean(jnp.argmax(logits, -1) == digits.test.labels))
    widths = [variables["params"][name].shape[-1] for name in ("first", "second")]
    before, after = (structure.count_macs(network, own, first[:1]) for own in (init(0), variables))
    print(f"accuracy {accuracy:.1%}, widths {widths}, {after / before:.2f} of the arithmetic")
    return {"accuracy": accuracy, "widths": widths, "macs": after / before}


if __name__ == "__main__":
    main()
