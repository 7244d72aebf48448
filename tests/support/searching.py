"""Problems for tests of jaxprune.search whose best answers are known."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import search, structure
from jaxprune.search._problems import Decision, Problem

SIZE = 32


class Planted(NamedTuple):
    """A network in which some channels are free, and the problem that must find them."""

    apply: Any
    variables: Any
    images: jax.Array
    groups: structure.Groups
    layers: tuple[search.Layer, ...]
    evaluate: Any  # minus the squared error to the dense outputs: 0 is the best
    answer: dict[str, int]  # name of a group -> channels that matter


def chain(variables, x):
    """Three hidden layers."""
    for name in ("a", "b", "c"):
        x = jax.nn.relu(x @ variables[name] + variables[f"{name}_bias"][None])
    return x @ variables["out"]


def planted(alive=(8, 32, 16)) -> Planted:
    """A chain in which only the first channels of each layer are not 0."""
    generator = np.random.default_rng(0)
    shapes = {"a": (6, SIZE), "b": (SIZE, SIZE), "c": (SIZE, SIZE), "out": (SIZE, 4)}
    variables = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    for name, count in zip(("a", "b", "c"), alive, strict=True):
        order = generator.permutation(SIZE)
        variables[name][:, order[count:]] = 0
        variables[f"{name}_bias"] = np.zeros(SIZE)
    variables = {name: jnp.asarray(own, jnp.float32) for name, own in variables.items()}
    images = jnp.asarray(generator.normal(size=(64, 6)), jnp.float32)
    dense = chain(variables, images)

    @jax.jit
    def evaluate(variables):
        return -jnp.mean((chain(variables, images) - dense) ** 2)

    groups = structure.find_groups(chain, variables, images)
    layers = search.find_layers(chain, variables, images[:1])
    answer = {f"{name}:1": count for name, count in zip(("a", "b", "c"), alive, strict=True)}
    return Planted(chain, variables, images, groups, layers, evaluate, answer)


def problem_of(own: Planted, budget: float | None = None, **options) -> Problem:
    """The problem whose budget is exactly what the answer costs."""
    cost = structure.count_parameters
    if budget is None:
        keep = {name: np.arange(SIZE) < count for name, count in own.answer.items()}
        budget = cost(own.groups.plan(keep)) / cost(own.groups.plan({}))
    return search.channels(
        own.groups, own.variables, own.layers, cost=cost, budget=budget, **options
    )


def synthetic(widths, cost, budget) -> Problem:
    """A problem without a network: any widths, any cost of counts, an absolute budget."""
    decisions = tuple(
        Decision(f"d{i}", int(own[-1]), np.asarray(own), np.arange(own[-1]), np.ones(own[-1]), ())
        for i, own in enumerate(widths)
    )
    sizes = tuple(own.size for own in decisions)
    return Problem(decisions, budget, cost(sizes), cost, cost, None, lambda v, c: c, lambda c: c)
