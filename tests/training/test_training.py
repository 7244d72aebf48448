"""Steps, chunks, devices, evaluation and the loop against plain references."""

import functools
import itertools
import json
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune
from jaxprune import data, models, sharding, training
from jaxprune.training import _accumulation as accumulation

KEY = jax.random.key(3)
ROWS = np.random.default_rng(0).permutation(64).astype(np.int32).reshape(4, 16)


class Net(nnx.Module):
    """Two dense layers with BatchNorm between: compiles fast, has statistics."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, images):
        hidden = self.first(images.reshape(images.shape[0], -1))
        return self.second(nnx.relu(self.norm(hidden)))


def _split(size=64):
    train, _, _ = data.make_synthetic(
        image_shape=(4, 4, 1), num_classes=3, train_size=size, test_size=1
    )
    return train


def _scale(images):
    return images.astype(jnp.float32) / 255 - 0.5


def _jitter(key, images):
    return _scale(images) + 0.1 * jax.random.normal(key, images.shape)


def _build(devices=1, tx=None, prepare=_jitter, model=None):
    """A mesh, the split on it, a state, the jitted steps and the evaluation."""
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    model = Net(rngs=nnx.Rngs(0)) if model is None else model
    graphdef, state = training.create_state(model, tx, mesh)
    run = training.make_chunk_step(training.make_train_step(graphdef, tx, prepare), mesh)
    evaluate = training.make_evaluate(graphdef, _scale, mesh)
    return mesh, sharding.replicate(_split(), mesh), state, run, evaluate


@functools.cache
def _shared(devices):
    """What `_build` gives, compiled once for all tests, and the first state on the host."""
    mesh, split, state, run, evaluate = _build(devices)
    return mesh, split, jax.device_get(state), run, evaluate


def _setup(devices=1):
    """Like `_build`, with functions that other tests have compiled; the state is a fresh copy."""
    mesh, split, state, run, evaluate = _shared(devices)
    return mesh, split, sharding.replicate(jax.tree.map(jnp.copy, state), mesh), run, evaluate


@pytest.mark.slow
def test_steps_equal_a_loop_written_by_hand():
    _, split, state, run, _ = _setup()
    losses = []
    for row in ROWS:
        state, metrics = run(state, split, row[None], KEY)
        losses.append(metrics["train_loss"][0])

    model = Net(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    host = _split()

    def loss_fn(model, images, labels):
        picked = jax.nn.log_softmax(model(images))[np.arange(len(labels)), labels]
        return -picked.mean()

    expected = []
    for number, row in enumerate(ROWS):
        images = _jitter(jax.random.fold_in(KEY, number), host.images[row])
        loss, grads = nnx.value_and_grad(loss_fn)(model, images, host.labels[row])
        optimizer.update(model, grads)
        expected.append(loss)

    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    wanted = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(state.params, wanted, rtol=1e-4, atol=1e-6)
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    chex.assert_trees_all_close(state.model_state, statistics, rtol=1e-4, atol=1e-6)
    assert int(state.step) == len(ROWS)


def test_chunk_equals_single_steps():
    _, split, state, run, _ = _setup()
    single = []
    for row in ROWS:
        state, metrics = run(state, split, row[None], KEY)
        single.append(metrics)
    _, _, other, _, _ = _setup()
    other, chunked = run(other, split, ROWS, KEY)
    chex.assert_trees_all_close(other, state, rtol=1e-5, atol=1e-6)
    stacked = jax.tree.map(lambda *values: jnp.concatenate(values), *single)
    chex.assert_trees_all_close(chunked, stacked, rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one():
    widths = models.Widths(4, ((4, 4), (4, 4), (4, 4)))
    results = []
    for devices in (1, 8):
        model = models.resnet8(num_classes=3, in_channels=1, widths=widths, rngs=nnx.Rngs(0))

        def prepare(key, images):
            return _scale(data.augment(key, images, pad=1, flip=True))

        _, split, state, run, _ = _build(devices, prepare=prepare, model=model)
        for row in ROWS[:3]:
            state, metrics = run(state, split, row[None], KEY)
        assert len(state.params["head"]["kernel"].devices()) == devices
        results.append(jax.device_get((state.params, state.model_state, metrics)))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "size"), [(1, 1), (1, 16), (1, 37), (8, 37)])
def test_evaluation_is_exact_with_a_ragged_last_batch(devices, size):
    mesh, _, state, _, evaluate = _setup(devices)
    host = _split(size)
    got = evaluate(state, sharding.replicate(host, mesh), 16)

    model = Net(rngs=nnx.Rngs(0))
    model.eval()
    logits = np.asarray(model(_scale(host.images)), np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(size), host.labels]
    assert got["test_accuracy"] == np.mean(logits.argmax(-1) == host.labels)
    np.testing.assert_allclose(got["test_loss"], losses.mean(), rtol=1e-5)


def test_evaluation_reads_running_statistics_and_changes_nothing():
    _, split, state, run, evaluate = _setup()
    state, _ = run(state, split, ROWS[:1], KEY)
    before = jax.device_get(state)
    # Statistics of a batch would make the result depend on how the split is cut.
    assert evaluate(state, split, 8)["test_loss"] == pytest.approx(
        evaluate(state, split, 64)["test_loss"], rel=1e-6
    )
    chex.assert_trees_all_equal(jax.device_get(state), before)


def test_the_raw_gradient_reaches_the_optimizer():
    class SeenState(NamedTuple):
        seen: object

    def update(updates, state, params=None, *, grad, **extra):
        return jax.tree.map(jnp.zeros_like, updates), SeenState(grad)

    zeros = optax.GradientTransformationExtraArgs(
        lambda params: SeenState(jax.tree.map(jnp.zeros_like, params)), update
    )
    _, split, state, run, _ = _build(tx=optax.chain(optax.scale(0.0), zeros))
    state, _ = run(state, split, ROWS[:1], KEY)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(state.opt_state[1].seen["second"]))


def test_state_is_donated_but_the_model_survives():
    model = Net(rngs=nnx.Rngs(0))
    _, split, state, run, _ = _build(model=model)
    old = state.params["first"]["kernel"]
    run(state, split, ROWS[:1], KEY)
    assert old.is_deleted()
    assert model.first.kernel[...].shape == (16, 8)


def test_one_compilation_per_chunk_length():
    traces = []

    def prepare(key, images):
        traces.append(images.shape)
        return _scale(images)

    mesh, split, state, run, _ = _build(prepare=prepare)
    batches = itertools.cycle(ROWS)
    training.fit(state, 9, run, split, batches, KEY, mesh, log_every=2, chunk=2)
    assert len(traces) == 2  # once for chunks of two, once for the odd step at the end


@pytest.mark.parametrize("chunk", [1, 3])
def test_fit_calls_at_the_right_steps_with_the_right_means(chunk):
    mesh, split, state, run, _ = _setup()
    logs, calls = [], []
    state = training.fit(
        state,
        7,
        run,
        split,
        itertools.cycle(ROWS),
        KEY,
        mesh,
        chunk=chunk,
        log_every=3,
        on_log=lambda step, state, values: logs.append((step, int(state.step), values)),
        hooks=[training.Hook(2, lambda step, state: calls.append((step, int(state.step))))],
    )
    assert calls == [(2, 2), (4, 4), (6, 6), (7, 7)]
    assert [row[:2] for row in logs] == [(3, 3), (6, 6), (7, 7)]

    _, _, state, _, _ = _setup()
    losses = []
    for row in itertools.islice(itertools.cycle(ROWS), 7):
        state, metrics = run(state, split, row[None], KEY)
        losses.append(float(metrics["train_loss"][0]))
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose([row[2]["train_loss"] for row in logs], means, rtol=1e-5)


def test_fit_in_two_parts_is_bit_equal():
    mesh, split, whole, run, _ = _setup()
    whole = training.fit(whole, 9, run, split, itertools.cycle(ROWS), KEY, mesh)
    _, _, parts, _, _ = _setup()
    batches = itertools.cycle(ROWS)
    for stop in (4, 4, 9):
        parts = training.fit(parts, stop, run, split, batches, KEY, mesh)
    chex.assert_trees_all_equal(parts, whole)


def test_fit_stops_when_told_without_losing_a_step():
    mesh, split, state, run, _ = _setup()
    answers = iter([False, False, True])
    state = training.fit(
        state, 9, run, split, itertools.cycle(ROWS), KEY, mesh, should_stop=lambda: next(answers)
    )
    assert int(state.step) == 2


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "fsdp": 2}, {"data": 1, "fsdp": 8}])
def test_any_mesh_and_streamed_batches_give_the_same_numbers(axes):
    """Rows of indices on one device; images and labels on meshes that split parameters."""
    tx, images = optax.sgd(0.1, momentum=0.9), np.asarray(_split().images)
    mesh, split, state, run, evaluate = _build(1, tx=tx)
    state = training.fit(state, 3, run, split, iter(ROWS), KEY, mesh)
    expected = jax.device_get(state), evaluate(state, split, 24)

    mesh = sharding.make_mesh(axes)
    wide = Wide(rngs=nnx.Rngs(0))
    _, spread = training.create_state(wide, tx, mesh)
    kernel = spread.params["first"]["kernel"], spread.opt_state[0].trace["first"]["kernel"]
    parts = axes.get("fsdp", 1)
    assert all(leaf.addressable_shards[0].data.size == leaf.size // parts for leaf in kernel)

    graphdef, state = training.create_state(Net(rngs=nnx.Rngs(0)), tx, mesh)
    step = training.make_train_step(graphdef, tx, _jitter)
    run = training.make_chunk_step(step, mesh, jax.tree.map(lambda x: x.sharding, state))
    batches = ((images[row], np.asarray(_split().labels)[row]) for row in ROWS)
    state = training.fit(state, 3, run, None, batches, KEY, mesh)

    def read():
        for first in range(0, 64, 24):
            row = np.arange(first, first + 24)
            kept = row < 64
            yield images[row * kept], np.asarray(_split().labels)[row * kept], kept

    found = jax.device_get(state), training.make_evaluate(graphdef, _scale, mesh)(state, read, 0)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_parameters_stay_split_while_training():
    """Also after chunks of steps, with momentum, masks and averages beside them."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    tx = jaxprune.chain(optax.sgd(0.1, momentum=0.9), jaxprune.agip_transform(0.5, stop=3, every=1))
    graphdef, state = training.create_state(Wide(rngs=nnx.Rngs(0)), tx, mesh)
    places = jax.tree.map(lambda x: x.sharding, state)
    run = training.make_chunk_step(training.make_train_step(graphdef, tx, _jitter), mesh, places)
    state = training.fit(state, 4, run, _split(), iter(ROWS), KEY, mesh, chunk=2)
    assert jax.tree.all(
        jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, places)
    )
    split = [x for x in jax.tree.leaves(state) if not x.is_fully_replicated]
    assert {x.dtype.name for x in split} == {"float32", "bool"} and len(split) == 4


class Wide(nnx.Module):
    """As `Net`, with a kernel that is large enough to be split."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.first = nnx.Linear(16, 512, rngs=rngs)
        self.second = nnx.Linear(512, 3, rngs=rngs)

    def __call__(self, images):
        return self.second(nnx.relu(self.first(images.reshape(images.shape[0], -1))))


def test_batch_must_divide_by_devices():
    mesh, split, state, run, _ = _setup(8)
    with pytest.raises(ValueError, match=r"`batch_size` .* \(8\), got 12; use for example 16"):
        sharding.check_batch(12, mesh)
    with pytest.raises(ValueError, match="`batch_size`"):
        training.fit(state, 1, run, split, iter([ROWS[0][:12]]), KEY, mesh)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_equals_numpy(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 4)).astype(np.float32), np.array([0, 3, 1, 1, 2])
    targets = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    got = training.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(got, -(targets * log_probs).sum(-1), rtol=1e-5)


@pytest.mark.slow
def test_loss_falls_on_digits():
    dataset = data.load("digits")
    mesh, tx = sharding.make_mesh(devices=jax.devices()[:1]), optax.sgd(0.1, momentum=0.9)
    model = models.resnet8(in_channels=1, rngs=nnx.Rngs(0))
    graphdef, state = training.create_state(model, tx, mesh)

    def prepare(key, images):
        images = data.augment(key, images, pad=1, flip=False)
        return data.normalize(images, dataset.mean, dataset.std)

    run = training.make_chunk_step(training.make_train_step(graphdef, tx, prepare), mesh)
    batches = data.index_batches(len(dataset.train.labels), 64, seed=0)
    losses = []
    training.fit(
        state,
        60,
        run,
        sharding.replicate(dataset.train, mesh),
        batches,
        KEY,
        mesh,
        log_every=20,
        on_log=lambda step, state, values: losses.append(values["train_loss"]),
    )
    assert losses[0] > 1.5
    assert losses[-1] < 0.7 * losses[0]


class Plain(nnx.Module):
    """No batch statistics: the parts of a batch do not see each other."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.conv(images)).mean((1, 2)))


def _one_step(tx, model, rows=ROWS[:1], devices=1, **options):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    graphdef, state = training.create_state(model, tx, mesh)
    step = training.make_train_step(graphdef, tx, _jitter, **options)
    run = training.make_chunk_step(step, mesh)
    split = sharding.replicate(_split(), mesh)
    return run(state, split, jnp.asarray(rows), KEY)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("options", [{"parts": 4}, {"parts": 8}, {"remat": True}])
def test_parts_and_rematerialisation_change_no_gradient(options, devices):
    tx = optax.sgd(0.1, momentum=0.9)
    expected = _one_step(tx, Plain(rngs=nnx.Rngs(0)))
    found = _one_step(tx, Plain(rngs=nnx.Rngs(0)), devices=devices, **options)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_parts_have_batch_statistics_of_their_own():
    """Running statistics move once for each part, from its examples i, i + parts, ..."""
    tx, parts = optax.sgd(0.0), 2
    state, _ = _one_step(tx, Net(rngs=nnx.Rngs(0)), parts=parts)
    model, inputs = (
        Net(rngs=nnx.Rngs(0)),
        _jitter(jax.random.fold_in(KEY, 0), _split().images[ROWS[0]]),
    )
    for part in range(parts):
        model(inputs[part::parts])
    expected = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    chex.assert_trees_all_close(state.model_state, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_parts_do_not_live_at_the_same_time():
    """Activations of four parts take less than half of the memory of the whole batch."""
    tx, mesh = optax.sgd(0.1), sharding.make_mesh(devices=jax.devices()[:1])
    model = models.resnet8(in_channels=1, rngs=nnx.Rngs(0))
    split = data.Split(jnp.zeros((64, 16, 16, 1), jnp.uint8), jnp.zeros(64, jnp.int32))
    graphdef, state = training.create_state(model, tx, mesh)
    sizes = []
    for parts in (1, 4):
        step = training.make_train_step(
            graphdef, tx, lambda key, images: _scale(images), parts=parts
        )
        compiled = (
            training.make_chunk_step(step, mesh)
            .lower(state, split, jnp.zeros((1, 64), jnp.int32), KEY)
            .compile()
        )
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(("platform", "loops"), [("cpu", 0), ("tpu", 1)])
def test_parts_are_a_loop_where_it_will_run(platform, loops):
    """Also where the program is made for another machine; on CPU a convolution in one is slow."""

    def gradients(params, model_state, inputs, labels):
        return params * inputs.sum(), (labels.sum(), model_state)

    found = jax.jit(accumulation.over_parts(gradients, 4))
    traced = found.trace(jnp.ones(3), jnp.ones(2), jnp.ones((8, 5)), jnp.ones(8))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.while") == loops


def test_parts_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"`parts` must divide the batch \(16\); got 3"):
        _one_step(optax.sgd(0.1), Plain(rngs=nnx.Rngs(0)), parts=3)


@pytest.mark.scripts
def test_the_benchmark_of_the_loop_runs(monkeypatch, tmp_path, capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "loop.py"
    record = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--json", str(record)])
    runpy.run_path(str(path), run_name="__main__")
    found = json.loads(record.read_text())
    assert found["ratio"] > 0 and all(found[name] > 0 for name in ("input", "dispatch", "device"))
    assert "| training.fit |" in capsys.readouterr().out
