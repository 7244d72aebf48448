"""The published policy of AMC for a ResNet-50 as an oracle for layers and costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import models, search, structure
from tests.search.amc_resnet50 import POLICY

# Published: 5.13 times fewer weights, with which the network needs a quarter of the products
DENSITIES = 0.5, 0.325, 0.24375, 0.195
MACS = 0.483, 0.333, 0.289, 0.2445


@pytest.fixture(scope="module")
def layers():
    model = nnx.eval_shape(lambda: models.resnet50(rngs=nnx.Rngs(0)))
    pure = structure.from_nnx(model)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return search.find_layers(pure.evaluate, pure.variables, image)


def test_the_layers_are_those_of_the_policy(layers):
    assert {own.path.removeprefix("params/") for own in layers} == set(POLICY)
    assert sum(own.weights for own in layers) == 25_502_912
    assert sum(own.macs for own in layers) == 4_089_184_256


@pytest.mark.parametrize("number", range(4))
def test_each_round_has_the_published_totals(layers, number):
    kept = {
        own.path: POLICY[own.path.removeprefix("params/")][number] * own.weights for own in layers
    }
    total = sum(own.weights for own in layers)
    assert sum(kept.values()) / total == pytest.approx(DENSITIES[number], abs=1e-5)
    cost = search.weight_macs(layers)
    assert cost(kept) / cost({}) == pytest.approx(MACS[number], abs=5e-4)


def test_the_last_round_is_least_dense_in_the_classifier(layers):
    last = {path: own[3] for path, own in POLICY.items()}
    assert (
        min(last, key=last.get) == "head/kernel" and max(last, key=last.get) == "stem/conv/kernel"
    )
    windows = [last[own.path.removeprefix("params/")] for own in layers if own.k == 3]
    assert np.mean(windows) == pytest.approx(0.189, abs=5e-4)
