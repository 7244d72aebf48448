"""`check` finds each fault it knows, names the leaf and the fix, and nothing where masks hold."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune
from jaxprune import stacks


def N(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


PARAMS = {"kernel": N(0, 20, 10), "bias": jnp.zeros(10)}


def _problems(report):
    return {(finding.path, finding.problem) for finding in report.findings}


def _trained(optimizer, params=PARAMS, steps=3, frozen=()):
    """Parameters and state after steps with gradients that are 0 for some leaves."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(steps):
        gradients = {
            name: jnp.zeros_like(leaf) if name in frozen else jnp.cos(7 * leaf) + leaf
            for name, leaf in params.items()
        }
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# ---- masks hold


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        jaxprune.chain(optax.adam(0.1), jaxprune.agip_transform(0.6, start=1, stop=1)),
        optax.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.6, stop=1)),
        jaxprune.chain(optax.sgd(0.1), jaxprune.rigl_transform(0.6, every=2, stop=2)),
        jaxprune.chain(optax.sgd(0.1), jaxprune.straight_through_transform(0.6, stop=1)),
        optax.MultiSteps(optax.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.6, stop=0)), 1),
    ],
)
def test_masks_that_hold(optimizer):
    params, state = _trained(optimizer)
    report = jaxprune.check(params, state)
    assert report.ok and report.findings == ()
    assert (report.leaves, report.weights, report.pruned) == (1, 200, 120)
    assert str(report) == "masks hold: 120 of 200 weights in 1 leaves are pruned"
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_a_new_state_has_nothing_to_tell():
    state = jaxprune.agip_transform(0.6, stop=5).init(PARAMS)
    assert jaxprune.check(PARAMS, state).ok


@pytest.mark.slow
def test_sharded_arrays_and_nnx():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"kernel": jax.device_put(N(0, 16, 8), rows)}
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.5, start=0, stop=0))
    params, state = _trained(tx, params)
    assert jaxprune.check(params, state).pruned == 64
    dense = jax.tree.map(lambda leaf: leaf + 1, params)
    assert _problems(jaxprune.check(dense, state)) == {
        ("kernel", "64 of 64 masked weights are not 0")
    }

    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    assert jaxprune.check(nnx.state(model, nnx.Param), optimizer.opt_state).ok


def test_a_whole_nnx_model_with_state_that_no_optimizer_sees():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(8, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.table = nnx.Variable(jnp.ones((8, 8)))

    model = Model(nnx.Rngs(0))
    tx = jaxprune.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.5, start=0, stop=0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    for whole in (model, nnx.state(model)):
        report = jaxprune.check(whole, optimizer.opt_state)
        assert report.ok and report.pruned == 32


def test_a_whole_module_and_its_arrays():
    module = {"kernel": PARAMS["kernel"], "act": jax.nn.relu, "rate": 0.5}
    pruned, masks = jaxprune.prune(module, 0.5)
    arrays = {"kernel": pruned["kernel"], "act": None, "rate": None}
    for tree in (pruned, arrays):
        state = jaxprune.fixed_mask_transform(masks).init(tree)
        assert jaxprune.check(pruned, state).ok and jaxprune.check(arrays, state).ok


def test_a_branch_that_the_optimizer_does_not_prune():
    params = {"m": {"a": N(0, 8, 8), "c": N(1, 8, 8)}, "h": {"k": N(2, 8, 8), "bias": N(3, 8)}}
    prune = jaxprune.magnitude_transform(0.5, start=0, stop=0)
    parts = {"x": jaxprune.chain(optax.sgd(0.1), prune), "y": optax.sgd(0.1)}
    optimizer = optax.partition(parts, {"m": "x", "h": "y"})
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    params = optax.apply_updates(params, updates)
    report = jaxprune.check(params, state)
    assert report.findings == () and (report.leaves, report.weights, report.pruned) == (2, 128, 64)
    masks = jaxprune.get_masks(state)
    summary = jaxprune.summarize(params, masks)
    assert (summary.total.kept, summary.total.masked_nonzeros) == (64 + 72, 0)


# ---- masks that do not hold


def test_pruning_that_is_not_last_leaves_no_zeros():
    optimizer = optax.chain(jaxprune.magnitude_transform(0.899, start=0, stop=0), optax.scale(0.5))
    params, state = _trained(optimizer, steps=1)
    report = jaxprune.check(params, state)
    assert not report.ok
    assert _problems(report) == {("kernel", "180 of 180 masked weights are not 0")}
    assert "last in the chain" in report.findings[0].fix
    # The same in a table: not 89.9 % of the average, but what is really 0.
    summary = jaxprune.summarize(params, jaxprune.get_masks(state))
    assert (summary.total.kept, summary.total.masked_nonzeros) == (30, 180)


def test_an_average_of_the_parameters_is_dense():
    optimizer = jaxprune.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.5, start=0, stop=0))
    params, state = _trained(optimizer)
    average = jax.tree.map(lambda a, b: (a + b) / 2, params, PARAMS)
    report = jaxprune.check(average, state)
    assert _problems(report) == {("kernel", "100 of 100 masked weights are not 0")}
    assert "jaxprune.apply_masks" in report.findings[0].fix
    assert jaxprune.check(jaxprune.apply_masks(average, jaxprune.get_masks(state)), state).ok


def test_masks_that_are_no_bools_any_more():
    state = jaxprune.fixed_mask_transform().init(PARAMS)
    state = state._replace(masks=jax.tree.map(lambda mask: mask.astype(jnp.int32), state.masks))
    report = jaxprune.check(PARAMS, state)
    assert _problems(report) == {("kernel", "its mask has dtype int32")}


def test_masks_that_are_missing_or_of_another_shape():
    state = jaxprune.fixed_mask_transform().init(PARAMS)
    other = {"kernel": N(0, 10, 20), "new": jnp.zeros((3, 3)), "scale": jnp.zeros(3)}
    assert _problems(jaxprune.check(other, state)) == {
        ("new", "no mask"),
        ("bias", "a mask without a leaf"),
        ("kernel", "its mask has shape (20, 10), the leaf (10, 20)"),
    }
    with pytest.raises(ValueError, match="`opt_state` holds no masks"):
        jaxprune.check(PARAMS, optax.sgd(0.1).init(PARAMS))


# ---- what is empty or has never moved


def test_empty_leaves_copies_and_rows():
    params = {
        "layers": {"kernel": jnp.zeros((4, 3, 5))},
        "embed": {"embedding": jnp.zeros((6, 3))},
        "head": jnp.zeros((3, 2)),
        "conv": jnp.zeros((6, 3)),
    }
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    masks["layers"]["kernel"][[1, 3]] = False
    masks["embed"]["embedding"][[0, 4, 5]] = False
    masks["head"][:] = False
    masks["conv"][0] = False  # an input that nothing uses is no fault
    state = jaxprune.fixed_mask_transform(masks).init(params)
    wanted = {("head", "keeps nothing"), ("embed/embedding", "3 rows keep nothing")}
    assert _problems(jaxprune.check(params, state)) == wanted
    report = jaxprune.check(params, state, stacked=stacks.under("layers"))
    assert _problems(report) == wanted | {("layers/kernel", "copies 1, 3: nothing is kept")}
    lines = str(report).splitlines()
    assert lines[0].startswith("3 findings; ")
    for path in ("head", "embed/embedding", "layers/kernel"):
        assert any(line.startswith(f"  {path}: ") for line in lines)
    assert all(finding.fix in str(report) for finding in report.findings)
    with pytest.raises(ValueError, match="`stacked` matches no leaf"):
        jaxprune.check(params, state, stacked=stacks.under("layer"))


def test_leaves_that_never_moved():
    """Frozen, or behind a factor that starts at 0: the average of AGIP says nothing about them."""
    params = {"a": N(0, 20, 10), "lora_b": N(1, 20, 10)}
    optimizer = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, start=2, stop=2))
    params, state = _trained(optimizer, params, frozen=("lora_b",))
    report = jaxprune.check(params, state)
    assert ("lora_b", "its average is 0 throughout") in _problems(report)
    assert {finding.path for finding in report.findings} == {"lora_b"}
    assert "`prunable`" in report.findings[0].fix


@pytest.mark.slow
def test_rows_never_seen_and_idle_experts():
    params = {"embedding": N(0, 6, 4), "experts": N(1, 3, 4, 4)}
    optimizer = jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.3, start=5, stop=5))
    state = optimizer.init(params)
    gradients = {
        "embedding": jnp.ones((6, 4)).at[jnp.array([1, 2])].set(0),
        "experts": jnp.ones((3, 4, 4)).at[1].set(0),
    }
    _, state = optimizer.update(gradients, state, params)
    report = jaxprune.check(params, state, stacked=stacks.under("experts"))
    assert _problems(report) == {
        ("embedding", "2 rows were never used: their average is 0"),
        ("experts", "copies 1: the average is 0"),
    }


def test_states_in_parts():
    params = {"a": N(0, 8, 8), "b": N(1, 8, 8), "c": N(2, 4)}
    parts = {
        "agip": jaxprune.chain(optax.sgd(0.1), jaxprune.agip_transform(0.5, start=1, stop=1)),
        "magnitude": optax.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.5, stop=1)),
        "rest": optax.sgd(0.1),
    }
    optimizer = optax.partition(parts, {"a": "agip", "b": "magnitude", "c": "rest"})
    params, state = _trained(optimizer, params, frozen=("a",))
    report = jaxprune.check(params, state)
    assert _problems(report) == {("a", "its average is 0 throughout")}
    assert (report.leaves, report.weights, report.pruned) == (2, 128, 64)


# ---- values that are not finite


@pytest.mark.parametrize("dtype", ["float32", "float8_e5m2"])
def test_weights_that_are_not_finite_are_named(dtype):
    params, state = _trained(optax.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.5, stop=0)))
    mask = np.asarray(jaxprune.get_masks(state)["kernel"])
    kept, masked = np.argwhere(mask)[0], np.argwhere(~mask)[0]
    kernel = params["kernel"].at[tuple(kept)].set(jnp.inf).at[tuple(masked)].set(jnp.nan)
    report = jaxprune.check(params | {"kernel": kernel.astype(dtype)}, state)
    assert _problems(report) == {("kernel", "2 weights are not finite, 1 of them masked")}
    assert "`refused` in the state" in report.findings[0].fix
    healed = jaxprune.apply_masks({"kernel": kernel, "bias": params["bias"]}, {
        "kernel": mask, "bias": True})  # fmt: skip
    assert _problems(jaxprune.check(healed, state)) == {("kernel", "1 weights are not finite")}
