"""Prunes and retrains in rounds, at the early learning rate: the method of Renda, Frankle, Carbin.

    python examples/rewind_your_loop.py

A driver takes three functions of a loop: how to start, to train and to evaluate. Each round prunes
20 % of the weights and trains again with the whole schedule. Rounds are on disk as soon as they are
finished, so the same command goes on where it was stopped. Expected on handwritten digits: about
97 % of the test images, dense and at 26 % of the weights.
"""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxprune
from jaxprune import data, rewinding

STEPS = 200


def main(steps: int = STEPS, rounds: int = 6) -> list[tuple[float, float]]:
    """Runs all rounds; returns density and accuracy of each."""
    digits = data.load("digits")
    images, test_images = (
        jnp.asarray(part.images.reshape(-1, 64) / 255 - 0.3, jnp.float32)
        for part in (digits.train, digits.test)
    )
    labels, test_labels = jnp.asarray(digits.train.labels), digits.test.labels
    schedule = rewinding.hold(optax.cosine_decay_schedule(0.2, steps), steps)
    optimizer = jaxprune.chain(
        optax.sgd(schedule, momentum=0.9),
        jaxprune.fixed_mask_transform(),  # last; the driver puts the masks into it
    )

    def apply(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"]

    @jax.jit
    def step(state, key):
        rows = jax.random.choice(key, len(labels), (64,))

        def loss(params):
            logits = apply(params, images[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        params = state["params"]
        updates, opt_state = optimizer.update(jax.grad(loss)(params), state["opt_state"], params)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}

    def init(number: int) -> Any:  # number of the round; 0 is the dense training
        keys, normal = jax.random.split(jax.random.key(number)), jax.nn.initializers.he_normal()
        params = {"first": normal(keys[0], (64, 128)), "second": normal(keys[1], (128, 10))}
        return {"params": params, "opt_state": optimizer.init(params)}

    def train(state: Any, start: int, stop: int, number: int) -> Any:
        for i in range(start, stop):
            state = step(state, jax.random.fold_in(jax.random.key(number), i))
        return state

    def evaluate(state: Any) -> float:
        return float(jnp.mean(jnp.argmax(apply(state["params"], test_images), -1) == test_labels))

    description = {"data": "digits", "batch": 64, "network": "64-128-10"}
    task = rewinding.Task(init, train, evaluate, schedule, steps, description)
    with tempfile.TemporaryDirectory() as workdir:  # in earnest: a folder that stays
        rewinding.train_dense(task, workdir)
        found = rewinding.rewind_learning_rate(task, workdir, rewinding.densities(rounds))
    for one in found:
        print(f"density {one.density:.0%}  accuracy {one.score:.1%}  steps {one.total_steps:,}")
    return [(one.density, one.score) for one in found]


if __name__ == "__main__":
    main()
