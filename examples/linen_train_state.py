"""Prunes a convolutional network of Flax Linen that trains with a `TrainState`.

    python examples/linen_train_state.py

Pruning is part of the optimizer that the `TrainState` holds; nothing else changes. Batch statistics
stay beside it as ever. Expected after 300 steps on handwritten digits: about 95 % of the test
images with exactly 80 % of the kernels' weights at 0.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import jaxprune
from jaxprune import data

STEPS = 300


class Network(nn.Module):
    """Two convolutions and a classifier."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width in (16, 32):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean((1, 2)))


class State(TrainState):
    """Flax's state with the statistics of the norms."""

    batch_stats: Any


@jax.jit
def train_step(state: State, images: jax.Array, labels: jax.Array) -> State:
    """Makes a step."""

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, images, train=True, mutable="batch_stats")
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, new["batch_stats"]

    gradients, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients, batch_stats=batch_stats)


def main(steps: int = STEPS) -> dict[str, float]:
    """Trains and tests; returns accuracy and sparsity."""
    digits, network = data.load("digits"), Network()
    images, test_images = (part.images / 255 - 0.3 for part in (digits.train, digits.test))
    variables = network.init(jax.random.key(0), images[:1], train=False)
    prune = jaxprune.agip_transform(0.8, every=10, stop=steps // 2)
    optimizer = jaxprune.chain(optax.adam(5e-3), prune)  # pruning goes last
    state = State.create(
        apply_fn=network.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optimizer,
    )
    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = random.integers(0, len(images), 64)
        state = train_step(state, images[rows], digits.train.labels[rows])

    print(jaxprune.summarize(state.params, jaxprune.get_masks(state.opt_state)))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = network.apply(variables, test_images, train=False)
    accuracy = float(jnp.mean(jnp.argmax(logits, -1) == digits.test.labels))
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    zeros = sum(int((leaf == 0).sum()) for leaf in kernels) / sum(leaf.size for leaf in kernels)
    print(f"accuracy {accuracy:.1%}, zeros {zeros:.1%}")
    return {"accuracy": accuracy, "zeros": zeros}


if __name__ == "__main__":
    main()
