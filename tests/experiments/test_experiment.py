"""Parts of an experiment: images that grow, micro-batches, rates after a cut, held-out images."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import data, models, patterns, structure, training
from jaxprune.experiments import experiment, network, optimizer, pruning, results, sources
from jaxprune.experiments.config import CONFIGS, Config


@pytest.fixture
def config():
    return CONFIGS["digits_resnet8"][1]


def _stage(sizes, phase=None):
    """Returns what `kept_share` reads: (channels, of so many at first) of each group."""
    groups = {str(i): SimpleNamespace(size=n, full=full) for i, (n, full) in enumerate(sizes)}
    return structure.Stage(structure.Network(None, groups), phase)


def test_small_images_are_means_of_pixels():
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    small = experiment.resized(jnp.asarray(images), (4, 4))
    assert small.shape == (2, 4, 4, 1)
    # The triangle of two pixels' width: 1 3 3 1, renormalised at the edges.
    weights = np.zeros((4, 8))
    for row in range(4):
        for pixel, weight in zip(range(2 * row - 1, 2 * row + 3), (1, 3, 3, 1)):
            if 0 <= pixel < 8:
                weights[row, pixel] = weight
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ah,bw,nhwc->nabc", weights, weights, images)
    np.testing.assert_allclose(small, expected, atol=1e-5)
    assert experiment.resized(small, (4, 4)) is small


@pytest.mark.parametrize(
    ("share", "until", "expected"), [(0.5, 0.3, (4, 6)), (1.0, 0.3, None), (0.5, 0.0, None)]
)
def test_small_size(config, share, until, expected):
    own = dataclasses.replace(config, small_images=share, small_until=until)
    sizes = {0: (8, 12)} if expected is None else {0: expected, 31: (8, 12)}
    assert experiment.image_sizes(own, (8, 12), 100) == sizes


@pytest.mark.slow
def test_while_images_are_small_they_are_small_in_tests_as_well(config):
    """A network that has seen small images only is no judge of large ones."""
    own = dataclasses.replace(config, small_images=0.5, small_until=0.4, method="none", steps=20)
    made = experiment.Experiment(own)
    state, small = (
        made.create(0),
        made.at(structure.Stage(structure.dense_network(made.groups), (4, 4))),
    )
    apply, variables = (
        made.functions.evaluate,
        network.as_variables(state.params, state.model_state),
    )
    images, labels = made.source.test
    prepared = made.source.prepare(jnp.asarray(images))
    for steps, size in ((small, (4, 4)), (made.dense, (8, 8))):
        logits = apply(variables, experiment.resized(prepared, size))
        expected = float(jnp.mean(training.cross_entropy(logits, jnp.asarray(labels))))
        assert steps.evaluate(state)["test_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_single_weights_go_after_channels():
    """Half of the channels are masked by step 2, then half of all weights by step 7."""
    w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 4))}
    groups = structure.find_groups(
        lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"], w, jnp.ones((1, 3))
    )
    own = Config(
        method="agip", granularity="channels", sparsity=0.5, prune_start=0.2, prune_stop=0.2,
        prune_every=1, fine_sparsity=0.5, fine_start=0.5, fine_stop=0.7,
    )  # fmt: skip
    tx = jaxprune.chain(optax.sgd(0.1), pruning.pruning_while_training(own, 10, groups))
    draws = np.random.default_rng(0)
    params = {name: jnp.asarray(draws.normal(size=x.shape), jnp.float32) for name, x in w.items()}
    state, kept = tx.init(params), []
    for _ in range(10):
        grads = {name: jnp.asarray(draws.normal(size=x.shape), x.dtype) for name, x in w.items()}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(sum(int(jnp.count_nonzero(leaf)) for leaf in params.values()))
    channels = structure.masked_channels(groups, state)["in:1"]
    assert channels.sum() == 4
    assert kept[1] == 56 and kept[2:5] == [56 - 12] * 3, "the inputs of four channels are 0"
    assert kept[-1] == 28, "half of 56, the zeros of channels first"
    assert sum(int(mask.sum()) for mask in jaxprune.get_masks(state).values()) == 28


def test_a_run_that_ends_with_weights_that_are_not_finite_has_a_summary():
    params, masks = {"w": jnp.array([[1.0, jnp.inf], [0.0, 2.0]])}, {"w": jnp.ones((2, 2), bool)}
    found = results.file_bytes(params, masks)
    assert found["int8"] is None and found["exact"] > 0 and found["bfloat16"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "weights"}, "`fine_sparsity` needs a method that prunes"),
        ({"prune_stop": 0.9}, "`fine_start` must lie between `prune_stop` (0.9)"),
        ({"fine_stop": 0.5}, "and `fine_stop` (0.5)"),
    ],
)
def test_single_weights_go_last_or_not_at_all(changes, message):
    options = {"method": "agip", "granularity": "channels", "fine_sparsity": 0.5} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**options)


@pytest.mark.parametrize(
    ("parts", "size", "sizes", "expected"),
    [
        (1, None, [(8, 16)], 1),
        (4, None, [(16, 16), (32, 32)], 4),
        (4, None, [(8, 16), (16, 32)], 2),
        (4, None, [(9, 16), (17, 32)], 4),  # 2.17 are not enough, and 3 do not divide 64
        (4, (4, 4), [(16, 16)], 1),
        (8, (4, 4), [(8, 16)], 1),
    ],
)
def test_micro_batches_shrink_with_activations(parts, size, sizes, expected):
    share = experiment.kept_share(_stage(sizes)) * math.prod(size or (8, 8)) / 64
    assert experiment.micro_batches(parts, 64, share) == expected


def test_without_groups_all_channels_are_kept():
    assert experiment.kept_share(_stage([])) == 1.0


def test_a_rate_rises_again_after_a_cut():
    schedule = optimizer.rewarmed(optax.constant_schedule(0.8), 10, 4)
    found = [float(schedule(jnp.asarray(step))) for step in (10, 11, 12, 13, 14, 50)]
    np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)
    assert optimizer.rewarmed(schedule, None, 4) is schedule
    assert optimizer.rewarmed(schedule, 10, 0) is schedule
    assert optimizer.rewarmed(schedule, 0, 4) is schedule, "a run that began small and will grow"


def test_the_first_images_are_trained_on():
    whole = data.load("digits")
    few = sources.held_out(whole, 100, first=300)
    assert np.array_equal(few.train.images, whole.train.images[:300])
    assert np.array_equal(few.test.labels, whole.train.labels[-100:])
    assert sources.held_out(whole, 0, first=300).test is whole.test
    with pytest.raises(ValueError, match="`train_images` must be at most the 1337 training images"):
        sources.held_out(whole, 100, first=1338)
    with pytest.raises(ValueError, match="`train_images` is for small data sets"):
        dataclasses.replace(CONFIGS["text_mini"][1], train_images=3)


@pytest.mark.slow
def test_what_was_held_out_is_not_what_is_tested_at_the_end(config):
    """The same weights are evaluated on held-out images, and on the test images."""
    own = dataclasses.replace(config, method="none", steps=4, validation=100, train_images=300)
    held, plain = experiment.Experiment(own), experiment.Experiment(config)
    assert held.source.size == 300 and plain.source.unseen is None
    state = held.create(0)
    found = held.dense.evaluate(state, held.source.unseen)
    assert found == plain.dense.evaluate(state) != held.dense.evaluate(state)


def test_held_out_images_are_training_images_that_are_not_trained_on():
    whole = data.load("digits")
    held = sources.held_out(whole, 100)
    joined = [np.concatenate(pair) for pair in zip(held.train, held.test)]
    assert all((a == b).all() for a, b in zip(joined, whole.train)) and len(held.test.labels) == 100
    assert sources.held_out(whole, 0) is whole


@pytest.mark.slow
def test_the_average_of_parameters(config):
    """Follows the parameters and is tested in their place, with the zeros of the masks."""
    own = dataclasses.replace(config, ema=0.75, weight_decay=0.0, momentum=0.0)
    prune = jaxprune.magnitude_transform(0.5, every=1, start=2, stop=2)
    tx = optimizer.make_optimizer(own, optax.constant_schedule(1.0), prune)
    params = {"kernel": jnp.asarray([[4.0, -3.0, 2.0, -1.0]])}
    state, expected = tx.init(params), params["kernel"]
    for _ in range(4):
        grads = {"kernel": jnp.asarray([[0.1, -0.1, 0.1, -0.1]])}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.75 * expected + 0.25 * params["kernel"]
    found = training.with_averages(params, state)["kernel"]
    np.testing.assert_allclose(found[0, :2], expected[0, :2], rtol=1e-6)
    assert (found[0, 2:] == 0).all() and (expected[0, 2:] != 0).all()
    assert training.with_averages(params, optax.sgd(0.1).init(params)) is params


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("filters", (3, 3, 16, 16), patterns.channels(axis=-1)),
        ("2:4", (3, 3, 16, 16), patterns.n_m(2, 4, axis=-2)),
        ("1:4", (3, 3, 1, 16), None),  # the first layer has one input
        ("4x4", (3, 3, 16, 16), patterns.blocks((None, None, 4, 4))),
        ("4x4", (3, 3, 1, 16), None),
        ("8x8", (64, 10), patterns.blocks((8, 8))),
    ],
)
def test_patterns_by_name(config, name, shape, expected):
    rule = pruning.pattern_of(dataclasses.replace(config, pattern=name))
    assert (rule("kernel", jnp.zeros(shape)) if callable(rule) else rule) == expected


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ('{"stem": 4', "Expecting"),
        ("[4]", "it must be an object, but is list"),
        ('{"stem": 4}', "it must have `blocks`, but has `stem`"),
        ('{"stem": 0, "blocks": []}', "`stem` must be a whole number of at least 1, but is 0"),
        ('{"stem": 4, "blocks": [[2, "4"]]}', "`blocks/0/1` must be a whole number"),
        ('{"stem": 4, "blocks": [], "tail": 1}', "it must not have `tail`"),
    ],
)
def test_widths_that_are_none_are_named(widths, message):
    with pytest.raises(ValueError, match="`widths` must be JSON as in summary.json: ") as error:
        network.read_widths(widths)
    assert message in str(error.value)


def test_widths_of_every_network_are_read_again():
    for own in (models.Widths(4, ((2, 4), (3, 8))), models.Widths(4, ((2, 4),), 7)):
        found = network.read_widths(json.dumps(own._asdict()))
        assert json.dumps(found) == json.dumps(own)
