"""Costs of choices: against counts of the extracted networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import elastic, structure, trees


def size_of(tree):
    return sum(leaf.size for leaf in trees.leaf_by_path(tree).values() if leaf is not None)


def ends_and_draws(space, number):
    rng = np.random.default_rng(0)
    draws = [elastic.draw(space.decisions, rng) for _ in range(number)]
    return [elastic.largest(space.decisions), elastic.smallest(space.decisions), *draws]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet8", {"streams": (0.5, 1.0)}), ("mbconv", {}), ("resnet8", {"resolutions": (6, 8)})],
)
def test_costs_are_those_of_the_extracted_module(name, options):
    space = elastic.named(name, image_size=8, **options)
    image = jnp.zeros((1, 8, 8, 1))
    macs, parameters = elastic.mac_cost(space, image), elastic.parameter_cost(space)
    for choice in ends_and_draws(space, 3):
        small = elastic.extract(space, space.variables, choice)
        module = elastic.to_module(space, small)
        pixels = small.resolution or 8
        counted = structure.count_macs(module, jnp.zeros((1, pixels, pixels, 1)))
        assert macs(choice) == counted
        assert parameters(choice) == size_of(small.crop()["params"])


def test_tables_are_asked_instead_of_plans(monkeypatch):
    space = elastic.named("resnet8", image_size=8)
    macs = elastic.mac_cost(space, jnp.zeros((1, 8, 8, 1)))
    plans = []
    monkeypatch.setattr(
        type(space.groups), "plan",
        (lambda real: lambda *a, **k: plans.append(1) or real(*a, **k))(type(space.groups).plan),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(300):
        macs(elastic.draw(space.decisions, rng))
    options = sum(len(own.options) for own in space.decisions)
    assert len(plans) <= 4 * options


def test_products_without_a_kernel_are_counted():
    def attention(w, x):
        q, k, v = (x @ w[name] for name in "qkv")
        return jax.nn.softmax(q @ k.T, -1) @ v @ w["out"]

    w = {name: jnp.ones((4, 8)) for name in "qkv"} | {"out": jnp.ones((8, 4))}
    x = jnp.ones((5, 4))
    groups = structure.find_groups(attention, w, x)
    (name,) = [own for own in groups if own.startswith("v")] or [next(iter(groups))]
    space = elastic.make_space(groups, w, attention, widths={name: (4, 8)})
    macs = elastic.mac_cost(space, x)
    for choice in [(0,), (1,)]:
        small = elastic.extract(space, w, choice)
        assert macs(choice) == structure.count_macs(attention, small.variables, x)


def test_errors():
    space = elastic.named("resnet8", image_size=8, resolutions=(6, 8))
    with pytest.raises(ValueError, match="`space` must vary widths and depths alone.*resolution"):
        elastic.plan_cost(space, structure.count_parameters)
    with pytest.raises(ValueError, match="`choice` must"):
        elastic.parameter_cost(space)((0,))
