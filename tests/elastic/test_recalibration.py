"""Statistics of sub-networks, computed again, and their accuracy: against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import elastic

CHOICES = [(0,), (1,), (2,)]


class Space:
    """A network of one hidden layer, of which 2, 4 or 8 channels are kept."""

    def __init__(self):
        self.traces = []

    def gates(self, choice):
        return jnp.asarray(np.arange(8) < 2 * 2 ** choice[0], jnp.float32)

    def resolution(self, choice):
        return None

    def masked(self, function):
        def run(variables, gates, images):
            self.traces.append(function.__name__)
            return function(variables, images, gates)

        return run


def hidden(variables, x, gates):
    return (x @ variables["params"]["first"]) * gates[None]


def train(variables, x, gates):
    old, h = variables["stats"], hidden(variables, x, gates)
    mean, var = h.mean(0), h.var(0)
    new = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + 0.1 * var}
    h = (h - mean[None]) / jnp.sqrt(var + 1e-5)[None]
    return jnp.maximum(h, 0) @ variables["params"]["second"], {"stats": new}


def evaluate(variables, x, gates):
    h, own = hidden(variables, x, gates), variables["stats"]
    h = (h - own["mean"][None]) / jnp.sqrt(own["var"] + 1e-5)[None]
    return jnp.maximum(h, 0) @ variables["params"]["second"]


@pytest.fixture
def variables():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(5, 8)), "second": rng.normal(size=(8, 3))}
    stats = {"mean": rng.normal(size=8), "var": 1 + rng.uniform(size=8)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"params": params, "stats": stats})


@pytest.fixture
def batches():
    """Pairs of images and labels, of unequal sizes."""
    rng = np.random.default_rng(1)
    return [
        (rng.normal(i, 1, (n, 5)).astype(np.float32), rng.integers(3, size=n))
        for i, n in enumerate((4, 9, 6))
    ]


def by_hand(variables, batches, kept):
    """Mean and variance of the kept channels over all rows, float64."""
    kernel = np.asarray(variables["params"]["first"], np.float64) * (np.arange(8) < kept)
    rows = np.concatenate([x for x, _ in batches]) @ kernel
    return rows, rows.mean(0), rows.var(0)


@pytest.mark.parametrize("choice", CHOICES)
def test_statistics_are_those_of_the_sub_network(variables, batches, choice):
    space = Space()
    images = [x for x, _ in batches]
    found = elastic.recalibrate(space.masked(train), variables, space.gates(choice), images)
    _, mean, var = by_hand(variables, batches, 2 * 2 ** choice[0])
    np.testing.assert_allclose(found["stats"]["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["stats"]["var"], var, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])


def test_accuracy_is_that_of_the_sub_network_and_nothing_compiles_again(variables, batches):
    space = Space()
    images = [x[:4] for x, _ in batches]  # of one shape
    pairs = [(x[:4], y[:4]) for x, y in batches]
    accuracy = elastic.make_accuracy(
        space, train, evaluate, variables, calibration=images, batches=pairs
    )
    found = [accuracy(choice) for choice in [*CHOICES, *CHOICES]]
    assert found[:3] == found[3:]
    assert sorted(space.traces) == ["evaluate", "train"]
    labels = np.concatenate([y for _, y in pairs])
    for choice, value in zip(CHOICES, found, strict=False):
        rows, mean, var = by_hand(variables, pairs, 2 * 2 ** choice[0])
        h = np.maximum((rows - mean) / np.sqrt(var + 1e-5), 0)
        logits = h @ np.asarray(variables["params"]["second"], np.float64)
        assert value == np.mean(np.argmax(logits, -1) == labels)
    # With the statistics of the elastic network they would be others.
    stale = np.argmax(evaluate(variables, jnp.concatenate(images), space.gates((0,))), -1)
    assert found[0] != np.mean(stale == labels)


def test_images_have_the_resolution_of_the_choice():
    shapes = set()

    class Sized(Space):
        def resolution(self, choice):
            return (4, 8)[choice[0]]

    def look(variables, x, gates):
        shapes.add(x.shape)
        mean = 0.9 * variables["stats"]["mean"] + 0.1 * x.mean((0, 1, 2))
        return x.mean((1, 2)), {"stats": {"mean": mean}}

    variables = {"params": {}, "stats": {"mean": jnp.zeros(3)}}
    images, labels = jnp.ones((2, 8, 8, 3)), jnp.zeros(2, jnp.int32)
    accuracy = elastic.make_accuracy(
        Sized(), look, lambda *args: look(*args)[0], variables, calibration=[images],
        batches=[(images, labels)],
    )  # fmt: skip
    assert accuracy((0,)) == 1.0 and shapes == {(2, 4, 4, 3)}
    assert accuracy((1,)) == 1.0 and shapes == {(2, 4, 4, 3), (2, 8, 8, 3)}


def test_errors(variables, batches):
    space, images = Space(), [x for x, _ in batches]
    plain = lambda variables, gates, x: (x, {})  # noqa: E731
    with pytest.raises(
        ValueError, match=r"(?s)`train` updates no running statistics.*without batch"
    ):
        elastic.recalibrate(plain, variables, space.gates((0,)), images)
    with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
        elastic.recalibrate(space.masked(train), variables, space.gates((0,)), [])
    own = {"calibration": images, "batches": batches}
    for name in own:
        with pytest.raises(ValueError, match=f"`{name}` must hold at least one"):
            elastic.make_accuracy(space, train, evaluate, variables, **(own | {name: []}))
