"""Prunes an MLP on handwritten digits in a plain Optax loop: dense, by magnitude, by AGIP.

    python examples/optax_loop.py

The loop is one that knows nothing of pruning. The optimizer is all that changes: magnitude pruning
is one more line, and AGIP is the same line with another name. Expected after 600 steps, with 90 %
of the weights at 0: dense about 98 %, magnitude and AGIP about 97 % of the test images.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from jaxprune import data

STEPS = 600


def digits() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Images as rows of 64 numbers around 0, and labels: for training, then for tests."""
    found = data.load("digits")
    images = [part.images.reshape(-1, 64) / 255 - 0.3 for part in (found.train, found.test)]
    return (
        jnp.asarray(images[0], jnp.float32),
        jnp.asarray(found.train.labels),
        jnp.asarray(images[1], jnp.float32),
        jnp.asarray(found.test.labels),
    )


def init(seed: int) -> dict[str, jax.Array]:
    """Three kernels."""
    normal = jax.nn.initializers.he_normal()
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"first": (64, 128), "second": (128, 128), "head": (128, 10)}
    return {name: normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Images to logits."""
    hidden = jax.nn.relu(x @ params["first"])
    return jax.nn.relu(hidden @ params["second"]) @ params["head"]


def train(optimizer: optax.GradientTransformation, steps: int) -> tuple[float, float]:
    """Trains a network; returns its accuracy on test images and the fraction of zeros."""
    images, labels, test_images, test_labels = digits()

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            logits = apply(params, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, random = init(0), np.random.default_rng(0)
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state, random.integers(0, len(labels), 64))
    accuracy = float(jnp.mean(jnp.argmax(apply(params, test_images), -1) == test_labels))
    zeros = sum(int((leaf == 0).sum()) for leaf in params.values())
    return accuracy, zeros / sum(leaf.size for leaf in params.values())


def main(steps: int = STEPS) -> dict[str, tuple[float, float]]:
    """Trains all three; returns accuracy and sparsity of each."""
    adam = optax.adam(2e-3)
    magnitude = jaxprune.magnitude_transform(0.9, every=10, stop=steps // 2)
    agip = jaxprune.agip_transform(0.9, every=10, stop=steps // 2)  # the changed line
    optimizers = {
        "dense": adam,
        "magnitude": jaxprune.chain(adam, magnitude),
        "agip": jaxprune.chain(adam, agip),
    }
    results = {}
    for name, optimizer in optimizers.items():
        results[name] = train(optimizer, steps)
        print(f"{name:10} accuracy {results[name][0]:.1%}  zeros {results[name][1]:.1%}")
    return results


if __name__ == "__main__":
    main()
