"""Residual blocks: what counts as one, what a plan removes, and that nothing else changes."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxprune
from jaxprune import checkpoints, structure, trees
from tests.support.checks import check, dense, draw, layer
from tests.support.faults import Fault, install

X = draw(5, 6)
NO = np.array([False])


def mlp(w, x):
    return jax.nn.gelu(x @ w["up"] + w["bias"][None]) @ w["down"]


def of_mlp(seed=0):
    return {
        "up": draw(8, 12, seed=seed),
        "bias": draw(12, seed=seed),
        "down": draw(12, 8, seed=seed),
    }


def network(*layers):
    """A residual network of functions `(weights, x) -> y`."""

    def function(w, x):
        x = dense(w, x, "in")
        for own, step in zip(w["layers"], layers, strict=True):
            x = step(own, x)
        return dense(w, x, "out")

    return function


def weights(*layers):
    return {"in": layer(6, 8), "layers": list(layers), "out": layer(8, 3)}


def plain(w, x):
    return x + mlp(w, x)


def names_of(function, variables, *args, **kwargs):
    return list(structure.find_groups(function, variables, *args, **kwargs).blocks)


# ---- what is a block


@pytest.mark.parametrize(
    "step",
    [
        plain,
        lambda w, x: mlp(w, x) + x,
        lambda w, x: jnp.tanh(x + mlp(w, jnp.tanh(x))),
        lambda w, x: (x * 0.7 + mlp(w, x)) / 2,
        lambda w, x: x.astype(jnp.bfloat16).astype(jnp.float32) + mlp(w, x),
        lambda w, x: jax.checkpoint(plain)(w, x),
        lambda w, x: x + jax.checkpoint(mlp)(w, x),
        lambda w, x: jax.jit(plain)(w, x),
        lambda w, x: x + jnp.where(x > 0, mlp(w, x), 0.0),
        lambda w, x: x + jax.vmap(lambda row: mlp(w, row[None])[0])(x),
    ],
)
def test_a_branch_is_found_however_it_is_written(step):
    variables = weights(of_mlp(1), of_mlp(2))
    function = network(step, step)
    groups = structure.find_groups(function, variables, X)
    assert list(groups.blocks) == ["layers/0/down", "layers/1/down"]
    members = groups.blocks["layers/1/down"].members
    assert {own.path for own in members} == {f"layers/1/{n}" for n in ("up", "bias", "down")}
    plan = groups.plan({"layers/0/down": NO})
    check([structure.Trace(function, (X,))], variables, groups, plan)
    small = plan.compact(variables)
    assert small["layers"][0] == {"up": None, "bias": None, "down": None}


@pytest.mark.parametrize(
    "step",
    [
        lambda w, x: mlp(w, x),
        lambda w, x: x - mlp(w, x),
        lambda w, x: jnp.concatenate([x, mlp(w, x)], 1)[:, 4:12],
        lambda w, x: x + jax.nn.sigmoid(mlp(w, x)),  # not 0 without its parameters
        lambda w, x: x @ w["down"].T[:, :8] + mlp(w, x),  # `down` is used elsewhere
        lambda w, x: jnp.tanh(x) * w["bias"][:8][None] + mlp(w, x),
        lambda w, x: x + 0.04 * x**3 + w["bias"][:8][None],
    ],
)
def test_what_is_no_branch_of_its_own_stays(step):
    assert names_of(network(step), weights(of_mlp(1)), X) == []


def test_parallel_branches_are_two_blocks():
    def parallel(w, x):
        return x + mlp(w[0], x) + mlp(w[1], x)

    variables = weights([of_mlp(1), of_mlp(2)])
    function = network(parallel)
    groups = structure.find_groups(function, variables, X)
    assert list(groups.blocks) == ["layers/0/0/down", "layers/0/1/down"]
    for name in groups.blocks:
        check([structure.Trace(function, (X,))], variables, groups, groups.plan({name: NO}))


def test_nested_branches_are_blocks_of_their_own():
    def outer(w, x):
        return x + (plain(w["inner"], x @ w["a"])) @ w["b"]

    own = {"inner": of_mlp(1), "a": draw(8, 8), "b": draw(8, 8, seed=3)}
    variables, function = weights(own), network(outer)
    groups = structure.find_groups(function, variables, X)
    assert list(groups.blocks) == ["layers/0/a", "layers/0/inner/down"]
    trace = [structure.Trace(function, (X,))]
    for keep in ({"layers/0/inner/down": NO}, {"layers/0/a": NO}):
        _, plan = check(trace, variables, groups, groups.plan(keep))
    assert plan.is_removed("layers/0/inner/up")


def test_shared_weights_are_no_block():
    def twice(w, x):
        return plain(w, plain(w, x))

    assert names_of(network(twice), weights(of_mlp(1)), X) == []


def test_a_block_loses_what_no_other_function_reads():
    variables, function = weights(of_mlp(1), of_mlp(2)), network(plain, plain)

    def penalised(w, x):
        return function(w, x), w["layers"][1]["up"] @ jnp.ones(12)

    def other(w, x):
        return dense(w, x, "in")

    traces = [structure.Trace(f, (X,)) for f in (function, other)]
    assert len(structure.find_groups(traces, variables).blocks) == 2
    traces = [structure.Trace(f, (X,)) for f in (function, penalised)]
    blocks = structure.find_groups(traces, variables).blocks
    assert {own.path for own in blocks["layers/0/down"].members} == paths("layers/0")
    assert {own.path for own in blocks["layers/1/down"].members} == paths(
        "layers/1", "bias", "down"
    )


def paths(prefix, *names):
    return {f"{prefix}/{name}" for name in names or ("up", "bias", "down")}


# ---- stacks


def scan_of(step, cast=jnp.asarray):
    """Two branches in each layer of a stack."""

    def function(w, x):
        def body(x, own):
            return step(own[1], step(own[0], x)), None

        layers = jax.tree.map(cast, w["layers"])
        return dense(w, lax.scan(body, dense(w, x, "in"), layers)[0], "out")

    return function


stacked = scan_of(plain)


def stack(count=4):
    layers = [(of_mlp(2 * n), of_mlp(2 * n + 1)) for n in range(count)]
    layers = jax.tree.map(lambda *leaves: 0.5 * jnp.stack(leaves), *layers)
    return {"in": layer(6, 8), "layers": layers, "out": layer(8, 3)}


@pytest.mark.parametrize(
    "rows",
    [
        ([1, 0, 1, 1], [1, 0, 1, 1]),  # a whole layer
        ([1, 0, 0, 1], [1, 1, 1, 1]),
        ([0, 1, 1, 1], [1, 1, 0, 0]),
        ([0, 0, 0, 0], [1, 1, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_each_layer_of_a_stack_keeps_its_own_branches(rows):
    variables = stack()
    groups = structure.find_groups(stacked, variables, X)
    assert [(n, b.size) for n, b in groups.blocks.items()] == [
        ("layers/0/down", 4),
        ("layers/1/down", 4),
    ]
    widths = {g: np.arange(group.size) % 2 == 0 for g, group in groups.items()}
    for more in ({}, widths):
        keep = dict(zip(groups.blocks, map(np.array, rows))) | more
        plan = groups.plan({k: np.array(v, bool) for k, v in keep.items()}, multiple=1)
        check([structure.Trace(stacked, (X,))], variables, groups, plan)
        small = plan.compact(variables)
        for own, part in zip(rows, small["layers"]):
            assert part["up"] is None if not any(own) else part["up"].shape[0] == sum(own)
        cost = structure.mac_cost(groups, stacked, variables, X)
        assert cost(plan) == structure.count_macs(plan.wrap(stacked), small, X)


@pytest.mark.parametrize(
    "function",
    [
        scan_of(jax.checkpoint(plain)),
        jax.checkpoint(scan_of(plain)),
        jax.jit(scan_of(jax.jit(plain))),
        scan_of(plain, lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32)),
    ],
)
def test_stacks_are_found_however_they_are_run(function):
    variables = stack()
    groups = structure.find_groups(function, variables, X)
    assert [block.size for block in groups.blocks.values()] == [4, 4]
    keep = dict(zip(groups.blocks, np.array([[0, 1, 1, 0], [1, 1, 0, 0]], bool)))
    check([structure.Trace(function, (X,))], variables, groups, groups.plan(keep))


def test_what_the_next_layer_needs_is_no_part_of_a_branch():
    """Attention of a layer makes what the next one adds to its scores."""

    def function(w, x):
        def body(carry, own):
            x, more = carry
            y = (x + more) @ own["up"]
            return (x + jax.nn.relu(y) @ own["down"], y[:, :8]), None

        x = dense(w, x, "in")
        (x, _), _ = lax.scan(body, (x, x), w["layers"][0])
        return dense(w, x, "out")

    variables = stack()
    variables["layers"] = ({k: variables["layers"][0][k] for k in ("up", "down")},)
    groups = structure.find_groups(function, variables, X)
    for name, block in groups.blocks.items():
        assert {own.path for own in block.members} == {"layers/0/down"}
        check(
            [structure.Trace(function, (X,))],
            variables,
            groups,
            groups.plan({name: np.arange(4) > 1}),
        )


def test_a_scan_backwards_keeps_its_layers():
    def function(w, x):
        def body(x, own):
            return plain(own[0], x), None

        return dense(w, lax.scan(body, dense(w, x, "in"), w["layers"], reverse=True)[0], "out")

    assert names_of(function, stack(), X) == []


def test_whole_layers_of_a_stack_leave_one_scan():
    variables = stack()
    groups = structure.find_groups(stacked, variables, X).joined(lambda name: name.split("/")[0])
    assert [(n, b.size) for n, b in groups.blocks.items()] == [("layers", 4)]
    plan = groups.plan({"layers": np.array([True, False, False, True])})
    small = plan.compact(variables)
    text = str(jax.make_jaxpr(plan.wrap(stacked))(small, X))
    assert text.count("scan[") == 1 and "length=2" in text
    np.testing.assert_allclose(plan.wrap(stacked)(small, X), stacked(small, X), atol=1e-6)
    assert plan.fits(stacked, variables, X)


def test_rows_that_something_else_reads_stay():
    def indexed(w, x):
        return stacked(w, x) + w["layers"][0]["up"][2, :3, 0][None]

    variables = stack()
    groups = structure.find_groups(indexed, variables, X)
    first, second = groups.blocks.values()
    assert (first.size, second.size) == (3, 4)
    plan = groups.plan({first.name: np.array([True, True, False])})
    assert plan.kept["layers/0/up"][0].tolist() == [True, True, True, False]
    check([structure.Trace(indexed, (X,))], variables, groups, plan)
    scores = structure.block_influence(groups, indexed, variables, [X])
    whole = structure.block_influence(
        structure.find_groups(stacked, variables, X), stacked, variables, [X]
    )
    np.testing.assert_allclose(scores[first.name], whole[first.name][[0, 1, 3]], rtol=1e-5)
    penalty = structure.find_groups(
        lambda w, x: stacked(w, x).sum() + (w["layers"][0]["up"] ** 2).sum(), variables, X
    )
    first, _ = penalty.blocks.values()
    assert {own.path for own in first.members} == paths("layers/0")  # a sum of squares loses 0


def test_outputs_of_all_layers_keep_their_rows():
    def hidden(w, x):
        def body(x, own):
            y = plain(own[1], plain(own[0], x))
            return y, y

        x, all_ = lax.scan(body, dense(w, x, "in"), w["layers"])
        return dense(w, x, "out"), all_

    variables = stack()
    groups = structure.find_groups(hidden, variables, X)
    keep = {name: np.array([True, False, True, False]) for name in groups.blocks}
    assert len(keep) == 2
    check([structure.Trace(hidden, (X,))], variables, groups, groups.plan(keep))


# ---- state


def normed(w, x, train):
    """A branch with running averages, which training renews."""
    y = x @ w["params"]["kernel"]
    mean = y.mean(0) if train else w["state"]["mean"]
    new = 0.9 * w["state"]["mean"] + 0.1 * y.mean(0)
    y = (y - mean[None]) * w["params"]["scale"][None]
    return x + y @ w["params"]["down"], new


def test_running_averages_disappear_with_their_branch():
    own = {"kernel": draw(8, 12), "scale": draw(12), "down": draw(12, 8)}
    variables = {"params": weights(own), "state": {"mean": draw(12)}}

    def call(w, x, train):
        params = w["params"]
        x = dense(params, x, "in")
        x, new = normed({"params": params["layers"][0], "state": w["state"]}, x, train)
        return dense(params, x, "out"), {"state": {"mean": new}}

    def evaluate(w, x):
        return call(w, x, False)[0]

    def train(w, x):
        return call(w, x, True)

    both = [
        structure.Trace(evaluate, (X,)),
        structure.Trace(train, (X,), lambda output: output[1]),
    ]
    for traces in (both[1:], both):
        groups = structure.find_groups(traces, variables)
        (block,) = groups.blocks.values()
        state = {own.path for own in block.members if not own.produces}
        assert state == ({"state/mean"} if len(traces) == 2 else set())
        plan = groups.plan({block.name: NO})
        small = plan.compact(variables)
        output, new = plan.wrap(train)(small, X)
        if len(traces) == 2:
            assert new == {"state": {"mean": None}} and small["state"]["mean"] is None
        np.testing.assert_allclose(output, train(plan.mask(variables), X)[0], atol=1e-6)
        plan.verify(train, variables, X, updates=lambda output: output[1])

    def reads(w, x):  # its averages are read outside of the branch
        return evaluate(w, x) + w["state"]["mean"][None, :3]

    with pytest.raises(ValueError, match="the plan removes state that this function needs"):
        plan.wrap(reads)(small, X)
    assert names_of([*both, structure.Trace(reads, (X,))], variables) == []


def test_a_cache_that_does_not_stay_0_keeps_its_branch():
    def call(write):
        def step(w, x):
            y = w["cache"] + mlp(w["branch"], x)
            return x + y, {"cache": write(w["cache"], y)}

        return step

    variables, x = {"branch": of_mlp(1), "cache": jnp.zeros((5, 8))}, draw(5, 8)
    for write, count in (
        (lambda past, y: 0.5 * (past + y), 1),
        (lambda past, y: past + 1.0, 0),
    ):
        names = names_of(call(write), variables, x, updates=lambda output: output[1])
        assert len(names) == count


# ---- plans


@pytest.fixture
def pruned():
    variables, function = weights(of_mlp(1), of_mlp(2)), network(plain, plain)
    groups = structure.find_groups(function, variables, X)
    return function, variables, groups, groups.plan({"layers/0/down": NO})


def test_plans_without_blocks_compose_and_are_saved(pruned, tmp_path):
    function, variables, groups, plan = pruned
    plan.save(tmp_path / "plan.json")
    loaded = structure.load_plan(tmp_path / "plan.json")
    assert loaded.shapes == plan.shapes and loaded.model.dtypes == plan.model.dtypes
    assert "layers/0/up [8x12] -> removed" in str(plan)
    left = groups.compact(plan)
    assert list(left.blocks) == ["layers/1/down"] and "layers/0/up:1" not in left
    found = structure.find_groups(plan.wrap(function), plan.compact(variables), X)
    assert found.model.consumers == left.model.consumers and found.keys() == left.keys()
    widths = left.plan({"layers/1/up:1": np.arange(12) < 5}, multiple=1)
    both = loaded.then(widths)
    small = both.compact(variables)
    assert small["layers"][1]["up"].shape == (8, 5)
    again = widths.compact(plan.compact(variables))
    jax.tree.map(np.testing.assert_array_equal, again, small)
    both.verify(function, variables, X)
    check([structure.Trace(function, (X,))], variables, groups, both)
    assert structure.count_parameters(both) == sum(map(np.size, jax.tree.leaves(small)))
    assert structure.byte_cost(variables)(both) == sum(x.nbytes for x in jax.tree.leaves(small))


def test_smaller_trees_train_on_with_their_optimizer(pruned):
    function, variables, _, plan = pruned
    optimizer = optax.adam(0.1)
    small = plan.compact(variables)
    state, restarted = structure.compact_state(
        plan, optimizer, optimizer.init(variables), variables
    )
    assert restarted == () and state[0].mu["layers"][0]["up"] is None
    call, traced = plan.wrap(function), []

    @jax.jit
    def step(small, state):
        traced.append(1)
        grads = jax.grad(lambda small: jnp.sum(call(small, X) ** 2))(small)
        updates, state = optimizer.update(grads, state, small)
        return optax.apply_updates(small, updates), state

    for _ in range(3):
        small, state = step(small, state)
    assert len(traced) == 1 and small["layers"][0]["up"] is None
    assert not np.allclose(small["layers"][1]["up"], variables["layers"][1]["up"])


@pytest.mark.slow
def test_smaller_trees_are_pruned_and_checkpointed(pruned, tmp_path):
    """Orbax refuses arrays without entries; None is no array."""
    _, variables, _, plan = pruned
    small = plan.compact(variables)
    optimizer = jaxprune.chain(optax.sgd(0.1), jaxprune.magnitude_transform(0.5, every=1, stop=2))
    state = small, optimizer.init(small)
    manager = checkpoints.open_manager(tmp_path)
    checkpoints.save(manager, 1, state, {})
    restored = checkpoints.restore(manager, state)[0]
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    manager.close()
    assert jaxprune.get_masks(state[1])["layers"][0]["up"] is None


def test_dtypes_of_removed_leaves_decide_that_of_the_stream(pruned):
    """A float32 branch makes a stream of bfloat16 float32, as zeros would."""
    function, variables, _, _ = pruned
    first = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    first["layers"][0] = variables["layers"][0]
    groups = structure.find_groups(function, first, X.astype(jnp.bfloat16))
    (name, *_) = groups.blocks
    plan = groups.plan({name: NO})
    out = plan.wrap(function)(plan.compact(first), X.astype(jnp.bfloat16))
    assert out.dtype == function(plan.mask(first), X.astype(jnp.bfloat16)).dtype == jnp.float32


def test_a_function_that_reads_removed_leaves_elsewhere_gets_zeros(pruned):
    function, variables, _, plan = pruned

    def other(w, x):
        return jax.nn.sigmoid(x[:, :3] @ w["layers"][0]["up"][:3]) + jnp.sum(function(w, x))

    small = plan.compact(variables)
    np.testing.assert_allclose(
        plan.wrap(other)(small, X), other(plan.mask(variables), X), rtol=1e-6
    )


def test_bad_trees_and_names_are_explained(pruned):
    function, variables, groups, plan = pruned
    small = plan.compact(variables)
    with pytest.raises(ValueError, match="layers/0/bias: not in the plan"):
        plan.wrap(function)(small | {"layers": [of_mlp(1), small["layers"][1]]}, X)
    with pytest.raises(ValueError, match="must have None in place of removed leaves"):
        plan.wrap(function)(small | {"layers": [{}, small["layers"][1]]}, X)
    with pytest.raises(ValueError, match="layers/0/down: int64"):
        groups.plan({"layers/0/down": 0})
    with pytest.raises(ValueError, match="`key` must join blocks of the same number of layers"):
        structure.Groups(
            groups.model,
            (),
            (),
            {},
            [own._replace(size=n) for n, own in enumerate(groups.blocks.values())],
        ).joined(lambda name: "all")


def summed(call):
    return lambda small: jnp.sum(call(small, X) ** 2)


def test_modules_are_variables_too():
    """None takes the place of arrays in modules of NNX and Equinox."""

    class Both(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
            self.branch = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
            self.last = nnx.Linear(8, 3, rngs=nnx.Rngs(2))

        def __call__(self, x):
            x = self.first(x)
            return self.last(x + self.branch(x))

    class Other(equinox.Module):
        branch: equinox.nn.Linear
        last: equinox.nn.Linear

        def __call__(self, x):
            return self.last(x + jnp.tanh(self.branch(x)))

    keys = jax.random.split(jax.random.key(0))
    other = Other(equinox.nn.Linear(6, 6, key=keys[0]), equinox.nn.Linear(6, 3, key=keys[1]))
    for model, function in (
        (Both(), lambda model, x: model(x)),
        (other, lambda model, x: jax.vmap(model)(x)),
    ):
        groups = structure.find_groups(function, model, X)
        ((name, _),) = groups.blocks.items()
        plan = groups.plan({name: NO})
        plan.verify(function, model, X)
        small = plan.compact(model)
        assert type(small) is type(model)
        assert len(jax.tree.leaves(small)) == len(jax.tree.leaves(model)) - 2

        grads = jax.grad(summed(plan.wrap(function)))(small)
        assert jax.tree.structure(grads) == jax.tree.structure(small)


def test_paths_are_those_of_the_tree(pruned):
    function, variables, groups, plan = pruned
    assert set(plan.shapes) == set(trees.leaf_by_path(plan.compact(variables)))
    assert "layers/0/down: a branch of a layer that can be removed" in str(groups)


# ---- faults


def stay(step):
    test_what_is_no_branch_of_its_own_stays(step)


def keeps_all_blocks_of_all_layers():
    test_each_layer_of_a_stack_keeps_its_own_branches(([1, 0, 0, 1], [1, 1, 1, 1]))


FAULTS = {
    "a sigmoid of 0 is 0": (
        Fault("_zeros._results", "if elementwise", 'if name == "logistic" or elementwise'),
        lambda: stay(lambda w, x: x + jax.nn.sigmoid(mlp(w, x))),
    ),
    "outputs need no branch": (
        Fault("_blocks._blocks", "if index not in each.traced.updated", "if False"),
        test_a_block_loses_what_no_other_function_reads,
    ),
    "any sum has a branch": (
        Fault("_branches.residuals", "if _depends(view, branch, terms):", "if True:"),
        lambda: stay(lambda w, x: jnp.tanh(x) * w["bias"][:8][None] + mlp(w, x)),
    ),
    "rows are not united": (
        Fault("scans._unite_rows", "analysis.unite(nodes, op.ins[place].nodes[0])", "pass"),
        keeps_all_blocks_of_all_layers,
    ),
    "all passes miss the same rows": (
        Fault("scans.segments", "(last.states, last.empty) == (inner, empty)", "True"),
        keeps_all_blocks_of_all_layers,
    ),
    "passes that change the stream are left out": (
        Fault("scans.segments", "if is_same and len(empty) == len(results):", "if any(inner):"),
        keeps_all_blocks_of_all_layers,
    ),
    "a sum with 0 is its other operand, whichever is 0": (
        Fault("_zeros._results", "op.ins[0 if ins[1] else 1]", "op.ins[1 if ins[1] else 0]"),
        lambda: test_a_branch_is_found_however_it_is_written(plain),
    ),
    "lost state is 0": (
        Fault("_plans.Plan.states", "else LOST", "else ZERO"),
        test_running_averages_disappear_with_their_branch,
    ),
    "the first trace decides": (
        Fault(
            "_blocks.find_blocks", "all(_vanishes(model, each, block) for each in known)", "True"
        ),
        test_a_block_loses_what_no_other_function_reads,
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_rule_of_blocks_is_noticed(name, monkeypatch):
    fault, test = FAULTS[name]
    test()
    install(monkeypatch, fault)
    with pytest.raises((Exception, pytest.fail.Exception)):  # noqa: B017
        test()
