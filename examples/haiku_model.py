"""Prunes a Haiku model: AC/DC, which alternates dense and sparse phases.

    pip install dm-haiku
    python examples/haiku_model.py

Haiku's parameters are a dict of dicts, which is all that pruning needs. Expected after 400 steps on
handwritten digits: about 94 % of the test images with 90 % of the weights of the three layers at 0.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune
from jaxprune import data

STEPS = 400


def main(steps: int = STEPS) -> dict[str, float]:
    """Trains and tests; returns accuracy and sparsity."""
    digits = data.load("digits")
    images, test_images = (
        (part.images.reshape(-1, 64) / 255 - 0.3).astype("float32")
        for part in (digits.train, digits.test)
    )
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([128, 128, 10])(x)))
    params = network.init(jax.random.key(0), images[:1])
    # Dense, sparse, dense, sparse, ...; the last phase is sparse.
    prune = jaxprune.acdc_transform(0.9, every=steps // 8, start=steps // 8, stop=3 * steps // 4)
    optimizer = jaxprune.chain(optax.adam(2e-3), prune)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            logits = network.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    random = np.random.default_rng(0)
    for i in range(steps):
        rows = random.integers(0, len(images), 64)
        params, state = step(params, state, images[rows], digits.train.labels[rows])
        if (i + 1) % (steps // 8) == 0:
            kept = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(params))
            print(f"step {i + 1}: {kept:,} weights are not 0")

    logits = network.apply(params, test_images)
    accuracy = float(jnp.mean(jnp.argmax(logits, -1) == digits.test.labels))
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    zeros = sum(int((w == 0).sum()) for w in kernels) / sum(w.size for w in kernels)
    print(f"accuracy {accuracy:.1%}, zeros {zeros:.1%}")
    return {"accuracy": accuracy, "zeros": zeros}


if __name__ == "__main__":
    main()
