"""Searches how many channels each layer of an MLP needs, at a third of its arithmetic.

    python examples/search_widths.py

Uniform widths, random ones under the same budget, and the cross-entropy method, without training in
between; then the found network is cut out. Expected on handwritten digits, at 0.33 of the
multiply-accumulates and before any fine-tuning: about 96 % of the test images. The layers of this
network need their channels alike: the cross-entropy method finds the uniform widths.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import data, search, structure

STEPS, BUDGET = 400, 0.33


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Images to logits."""
    for name in ("first", "second", "third"):
        x = jax.nn.relu(x @ params[name])
    return x @ params["head"]


def train(images: jax.Array, labels: jax.Array, steps: int) -> Any:
    """A trained dense network."""
    normal, keys = jax.nn.initializers.he_normal(), jax.random.split(jax.random.key(0), 4)
    shapes = {"first": (64, 96), "second": (96, 96), "third": (96, 96), "head": (96, 10)}
    params = {name: normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            logits = apply(params, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, random = optimizer.init(params), np.random.default_rng(0)
    for _ in range(steps):
        params, state = step(params, state, random.integers(0, len(labels), 64))
    return params


def main(steps: int = STEPS, evaluations: int = 200) -> dict[str, float]:
    """Searches; returns the accuracy of each search's network on test images."""
    digits = data.load("digits")
    images, test_images = (
        jnp.asarray(part.images.reshape(-1, 64) / 255 - 0.3, jnp.float32)
        for part in (digits.train, digits.test)
    )
    labels, test_labels = jnp.asarray(digits.train.labels), jnp.asarray(digits.test.labels)
    params = train(images[:-400], labels[:-400], steps)  # the last ones are for the search

    groups = structure.find_groups(apply, params, images[:1])
    layers = search.find_layers(apply, params, images[:1])
    cost = structure.mac_cost(groups, apply, params, images[:1])
    inputs = search.find_inputs(apply, params, [images[:-400]], groups)
    problem = search.channels(
        groups,
        params,
        layers,
        cost=cost,
        budget=BUDGET,
        refit=lambda params, plan: search.reconstruct(params, plan, inputs),
    )

    @jax.jit
    def accuracy(params, images, labels):
        return jnp.mean(jnp.argmax(apply(params, images), -1) == labels)

    def evaluate(params):
        return accuracy(params, images[-400:], labels[-400:])

    results = {"dense": float(accuracy(params, test_images, test_labels))}
    for found in (
        search.uniform(problem, evaluate),
        search.random(problem, evaluate, evaluations=evaluations, seed=0),
        search.cross_entropy(problem, evaluate, evaluations=evaluations, seed=0),
    ):
        small = found.plan.compact(search.reconstruct(params, found.plan, inputs))
        test = float(accuracy(small, test_images, test_labels))
        results[found.search] = test
        print(f"{found.search:14} {test:.1%}, keeps {list(found.kept.values())}")
    return results


if __name__ == "__main__":
    main()
