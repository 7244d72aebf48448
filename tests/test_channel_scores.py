"""Scores of channels from calibration data, against what NumPy computes from the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import models, post_training, structure

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def scored(apply, variables, batches):
    groups = structure.find_groups(apply, variables, batches[0])
    return post_training.channel_scores(apply, variables, batches, groups)


def test_a_channel_counts_in_every_layer_that_reads_it():
    w = {"in": draw(3, 5), "a": draw(5, 4), "b": draw(2, 5)}

    def apply(w, x):
        hidden = jax.nn.relu(x @ w["in"])
        return hidden @ w["a"], hidden @ w["b"].T

    batches = [draw(6, 3), draw(2, 3)]
    found = scored(apply, w, batches)
    hidden = np.maximum(np.concatenate(batches) @ np.asarray(w["in"]), 0)
    energy = (hidden**2).sum(0)
    wanted = energy * ((np.asarray(w["a"]) ** 2).sum(1) + (np.asarray(w["b"]) ** 2).sum(0))
    assert list(found) == ["in:1"]
    np.testing.assert_allclose(found["in:1"], wanted, rtol=1e-5)


def test_the_channel_of_a_convolution():
    w = {"first": draw(3, 3, 2, 4), "second": draw(2, 2, 4, 3)}

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def apply(w, x):
        return conv(jax.nn.relu(conv(x, w["first"])), w["second"])

    x = draw(2, 6, 6, 2)
    found = scored(apply, w, [x])["first:3"]
    hidden, second = np.asarray(jax.nn.relu(conv(x, w["first"]))), np.asarray(w["second"])
    wanted = np.zeros(4)
    for i in range(2):
        for j in range(2):
            energy = (hidden[:, i : i + 3, j : j + 3] ** 2).sum((0, 1, 2))
            wanted += energy * (second[i, j] ** 2).sum(1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_heads_and_mlp_of_a_decoder_and_of_its_stack(scanned, monkeypatch):
    """A head of keys and values has the features of all heads that share it, in every layer."""
    options = {"width": 12, "layers": [(4, 2, 10)] * 2, "head_dim": 4}
    model = models.Decoder(20, scanned=scanned, rngs=nnx.Rngs(1), **options)
    graphdef, state = nnx.split(model)
    variables, tokens = nnx.to_pure_dict(state), np.random.default_rng(3).integers(0, 20, (3, 7))
    found = scored(lambda w, x: nnx.merge(graphdef, w)(x), variables, [tokens])

    if scanned:  # the same layers as a list, whose inputs are seen one by one
        layers = [jax.tree.map(lambda x, i=i: x[i], variables["layers"]) for i in range(2)]
        model = models.Decoder(20, rngs=nnx.Rngs(1), **options)
        nnx.update(model, variables | {"layers": dict(enumerate(layers))})
    call, inputs = nnx.Linear.__call__, {}

    def recorded(self, x):
        inputs[id(self)] = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        return call(self, x)

    monkeypatch.setattr(nnx.Linear, "__call__", recorded)
    model(jnp.asarray(tokens))

    def energy(linear):
        kernel = np.asarray(linear.kernel[...], np.float64)
        return (inputs[id(linear)] ** 2).sum(0) * (kernel**2).sum(1)

    heads = [energy(layer.out).reshape(2, 8).sum(1) for layer in model.layers]
    hidden = [energy(layer.down) for layer in model.layers]
    if scanned:
        wanted = {"layers/key/kernel:2": sum(heads), "layers/gate/kernel:2": sum(hidden)}
    else:
        wanted = {f"layers/{i}/key/kernel:1": own for i, own in enumerate(heads)}
        wanted |= {f"layers/{i}/gate/kernel:1": own for i, own in enumerate(hidden)}
    for name, own in wanted.items():
        np.testing.assert_allclose(found[name], own, rtol=1e-4, err_msg=name)


def test_bad_data_are_named():
    w = {"in": draw(3, 5), "out": draw(5, 4)}

    def apply(w, x):
        return (x @ w["in"]) @ w["out"]

    groups = structure.find_groups(apply, w, draw(2, 3))
    with pytest.raises(ValueError, match="`batches` is empty"):
        post_training.channel_scores(apply, w, [], groups)
    with pytest.raises(ValueError, match="out"):
        post_training.channel_scores(apply, w, [jnp.full((2, 3), jnp.inf)], groups)
