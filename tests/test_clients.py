"""What users do, from the first step to files and smaller arrays, in four frameworks."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxprune
from jaxprune import post_training, reports, rewinding, storage, structure, trees
from tests.support.clients import CLIENTS, IMAGES, cross_entropy, flat

pytestmark = pytest.mark.slow

SIZES = {"conv": 3 * 3 * 3 * 8, "hidden": 8 * 16, "head": 16 * 4}


def pruning():
    return jaxprune.chain(
        optax.adam(0.02), jaxprune.magnitude_transform(0.75, every=1, start=0, stop=3)
    )


@functools.cache
def trained(name):
    """A client after six steps; tests must not train it on."""
    client = CLIENTS[name](pruning())
    client.losses = client.fit(6)
    return client


@pytest.fixture(params=CLIENTS)
def client(request):
    return trained(request.param)


def paths(client):
    """The paths of the three kernels, which their sizes tell apart."""
    leaves = trees.leaf_by_path(client.params)
    found = {layer: [p for p, x in leaves.items() if x.size == n] for layer, n in SIZES.items()}
    return {layer: path for layer, (path,) in found.items()}


def kernels(client, tree):
    """The leaves of the three kernels in a tree like the parameters."""
    leaves = trees.leaf_by_path(tree)
    return {layer: leaves[path] for layer, path in paths(client).items()}


def logits(client, params=None):
    variables = client.variables if params is None else client.with_params(params)
    return jax.jit(client.evaluate)(variables, IMAGES)


def test_training_prunes(client):
    masks = jaxprune.get_masks(client.opt_state)
    kept = sum(int(np.sum(mask)) for mask in kernels(client, masks).values())
    assert kept == sum(SIZES.values()) // 4
    for layer, leaf in kernels(client, client.params).items():
        np.testing.assert_array_equal(leaf != 0, kernels(client, masks)[layer])
    assert jaxprune.check(client.params, client.opt_state).ok
    assert client.losses[-1] < client.losses[0] and np.isfinite(client.losses).all()


def test_one_call_prunes(client):
    budget = {paths(client)["head"]: 0.5, paths(client)["conv"]: 0.75}
    pruned, masks = jaxprune.prune(client.params, 0.875, budget=budget)
    assert jax.tree.structure(pruned) == jax.tree.structure(client.params)
    counts = {layer: int(np.sum(leaf)) for layer, leaf in kernels(client, masks).items()}
    assert counts == {"conv": 54, "hidden": 16, "head": 32}
    assert np.isfinite(logits(client, pruned)).all()
    again = jaxprune.apply_masks(client.params, masks)
    for ours, theirs in zip(flat(pruned), flat(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_report_counts(client):
    masks = jaxprune.get_masks(client.opt_state)
    before, after = jaxprune.summarize(client.params), jaxprune.summarize(client.params, masks)
    assert sum(row.reason is None for row in before.rows) == 3
    assert before.total.parameters == sum(leaf.size for leaf in flat(client.params))
    assert after.total.nonzeros == sum(int(np.count_nonzero(x)) for x in flat(client.params))
    assert after.total.masked_nonzeros == 0
    assert str(after).splitlines()[-1].startswith("total")
    dense, sparse = reports.checkpoint_bytes(client.params, masks)
    assert sparse < 0.75 * dense


def test_files_bring_the_network_back(client):
    masks, file = jaxprune.get_masks(client.opt_state), io.BytesIO()
    storage.save(file, client.params, masks)
    file.seek(0)
    params, kept = storage.load(file, like=client.params)
    np.testing.assert_array_equal(logits(client), logits(client, params))
    for layer, mask in kernels(client, masks).items():
        np.testing.assert_array_equal(mask, kernels(client, kept)[layer])


def test_a_checkpoint_brings_the_training_back(client, tmp_path):
    state = {"params": client.params, "opt_state": client.opt_state}
    state = jax.tree.map(jnp.asarray, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(flat(restored), flat(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert jaxprune.check(restored["params"], restored["opt_state"]).ok


def removed(client):
    """The client with half of the channels, and the plan that made it."""

    def is_parameter(path, leaf):
        del leaf
        return path.startswith(client.under)

    groups = structure.find_groups(client.traces, client.variables, parameters=is_parameter)
    scores = structure.filter_norms(groups, client.variables)
    plan = groups.plan(structure.keep_uniform(groups, scores, 0.5), multiple=1)
    return client.small(plan, groups), plan, groups


def test_channels_are_removed(client):
    small, plan, groups = removed(client)
    assert sorted(group.size for group in groups.values()) == [8, 16]
    sizes = {layer: int(np.size(leaf)) for layer, leaf in kernels(client, small.params).items()}
    assert sizes == {"conv": 108, "hidden": 32, "head": 32}
    assert plan.verify(client.evaluate, client.variables, IMAGES) < 1e-5
    masked = jax.jit(client.evaluate)(plan.mask(client.variables), IMAGES)
    np.testing.assert_allclose(logits(small), masked, atol=1e-5)


def test_training_goes_on_with_fewer_channels(client):
    small, _, _ = removed(client)
    shapes = [leaf.shape for leaf in flat(small.opt_state)]
    losses = small.fit(12)
    assert losses[-1] < losses[0]
    assert [leaf.shape for leaf in flat(small.opt_state)] == shapes
    assert jaxprune.check(small.params, small.opt_state).ok
    assert np.isfinite(logits(small)).all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning_after_training(client, method):
    client = CLIENTS[type(client).__name__.lower()](optax.sgd(0.1))  # dense

    def apply(params, x):
        return client.evaluate(client.with_params(params), x)

    function = getattr(post_training, method)
    pruned, masks = function(apply, client.params, [IMAGES], 0.5)
    # Wanda rounds for each output, of which the convolution has 27 weights.
    kept = {"conv": 8 * 13 if method == "wanda" else 108, "hidden": 64, "head": 32}
    for layer, leaf in kernels(client, pruned).items():
        assert int(np.sum(kernels(client, masks)[layer])) == kept[layer]
        assert not np.any(np.where(kernels(client, masks)[layer], 0, leaf))
    assert jax.tree.structure(pruned) == jax.tree.structure(client.params)
    # An equal share of random weights would do more harm.
    random, _ = jaxprune.prune(
        client.params,
        0.5,
        score=jaxprune.scores.random(0),
        budget=jaxprune.budgets.uniform,
        prunable=jax.tree.map(lambda mask: np.ndim(mask) > 0 and not np.all(mask), masks),
    )
    dense = logits(client)
    error, other = (np.abs(logits(client, params) - dense).mean() for params in (pruned, random))
    assert error < other


def test_rewinding(client, tmp_path):
    steps = 4
    schedule = rewinding.hold(optax.cosine_decay_schedule(0.1, steps), steps)
    tx = jaxprune.chain(optax.sgd(schedule, momentum=0.9), jaxprune.fixed_mask_transform())
    start = client.params

    def loss(params):
        return cross_entropy(client.evaluate(client.with_params(params), IMAGES))

    @jax.jit
    def step(state):
        updates, opt_state = tx.update(
            jax.grad(loss)(state["params"]), state["opt_state"], state["params"]
        )
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def train(state, first, last, number):
        del number
        for _ in range(first, last):
            state = step(state)
        return state

    task = rewinding.Task(
        init=lambda number: {"params": start, "opt_state": tx.init(start)},
        train=train,
        evaluate=lambda state: -float(loss(state["params"])),
        schedule=schedule,
        steps=steps,
        description={"client": type(client).__name__},
    )
    rounds = rewinding.rewind_weights(task, tmp_path, [0.8], to=1)
    assert [round(one.density, 2) for one in rounds] == [1.0, 0.8]
    assert rounds[1].total_steps == steps + steps - 1
    assert np.isfinite([one.score for one in rounds]).all()
