"""Trains one elastic MLP on handwritten digits, and cuts out the best part for three budgets.

    python examples/elastic_network.py

One training of 800 steps makes all 27 sub-networks work; a predictor and an evolution choose one
for each budget, and it is cut out as an ordinary smaller tree, without training it again.
Expected: about 96 % of the test images at the full size, 95 % at a quarter of its arithmetic, and
79 % at 6 %.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, elastic, structure

STEPS = 800


def apply(variables: Any, images: jax.Array) -> jax.Array:
    """Images to logits."""
    params, x = variables["params"], images.reshape(len(images), -1)
    for name in ("first", "second", "third"):
        x = jax.nn.relu(x @ params[name])
    return x @ params["head"]


def make_space(seed: int) -> elastic.Space:
    """Each hidden layer has 4, 16 or all of its 64 channels."""
    normal, keys = jax.nn.initializers.he_normal(), jax.random.split(jax.random.key(seed), 4)
    shapes = {"first": (64, 64), "second": (64, 64), "third": (64, 64), "head": (64, 10)}
    params = {name: normal(key, shape) for key, (name, shape) in zip(keys, shapes.items())}
    variables = {"params": params}
    groups = structure.find_groups(apply, variables, jnp.ones((1, 8, 8, 1)))
    return elastic.make_space(
        groups,
        variables,
        apply,
        train=lambda variables, x: (apply(variables, x), {}),  # there is no state to update
        widths={f"params/{name}:1": (4, 16, 64) for name in ("first", "second", "third")},
    )


def main(steps: int = STEPS) -> list[tuple[float, float]]:
    """Trains and specialises; returns the cost and the accuracy of the network of each budget."""
    digits, space = data.load("digits"), make_space(0)
    held_out = digits.train.images[-300:], digits.train.labels[-300:]
    fewer = digits._replace(
        train=digits.train._replace(
            images=digits.train.images[:-300], labels=digits.train.labels[:-300]
        )
    )
    recipe = elastic.Recipe(batch_size=64, pad=0, flip=False)
    trained = elastic.train(space, fewer, steps=steps, networks=2, recipe=recipe)

    def prepared(images: np.ndarray) -> jax.Array:
        return data.normalize(jnp.asarray(images), digits.mean, digits.std)

    network = jax.jit(space.masked(apply))

    def evaluate(choice: elastic.Choice) -> float:
        logits = network(trained.variables, space.gates(choice), prepared(held_out[0]))
        return float(jnp.mean(jnp.argmax(logits, -1) == held_out[1]))

    cost = elastic.mac_cost(space, prepared(held_out[0][:1]))
    whole = cost(elastic.largest(space.decisions))
    budgets = [part * whole for part in (0.1, 0.3, 1.0)]
    front = elastic.specialise(space.decisions, evaluate, cost, budgets, measured=16)
    print(front)

    results = []
    for point in front.points:
        small = elastic.extract(space, trained.variables, point.choice)
        logits = apply(small.crop(), prepared(digits.test.images))
        accuracy = float(jnp.mean(jnp.argmax(logits, -1) == digits.test.labels))
        widths = [small.crop()["params"][name].shape[1] for name in ("first", "second", "third")]
        print(f"{point.cost / whole:.2f} of the arithmetic: widths {widths}, {accuracy:.1%}")
        results.append((point.cost / whole, accuracy))
    return results


if __name__ == "__main__":
    main()
