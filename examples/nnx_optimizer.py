"""Prunes a Flax NNX module that trains with an `nnx.Optimizer`, and saves it as a sparse file.

    python examples/nnx_optimizer.py

Expected after 400 steps on handwritten digits: about 95 % of the test images with 90 % of the
weights of the kernels at 0, and a file of less than a quarter of the bytes of the dense arrays.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxprune
from jaxprune import data, storage

STEPS = 400


class Network(nnx.Module):
    """Three linear layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


@nnx.jit
def train_step(model: Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    """Makes a step."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def main(steps: int = STEPS) -> dict[str, float]:
    """Trains, tests and saves; returns accuracy, and bytes relative to the dense arrays."""
    digits = data.load("digits")
    images, test_images = (
        (part.images.reshape(-1, 64) / 255 - 0.3).astype("float32")
        for part in (digits.train, digits.test)
    )
    prune = jaxprune.magnitude_transform(0.9, every=10, stop=steps // 2)
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jaxprune.chain(optax.adam(2e-3), prune), wrt=nnx.Param)
    random = np.random.default_rng(0)
    for _ in range(steps):
        rows = random.integers(0, len(images), 64)
        train_step(model, optimizer, images[rows], digits.train.labels[rows])
    accuracy = float(jnp.mean(jnp.argmax(model(test_images), -1) == digits.test.labels))

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with tempfile.TemporaryDirectory() as folder:
        size = storage.save(Path(folder) / "network.npz", params).bytes
    share = size / sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"accuracy {accuracy:.1%}, file {size:,} bytes, {share:.2f} of the dense arrays")
    return {"accuracy": accuracy, "file": share}


if __name__ == "__main__":
    main()
