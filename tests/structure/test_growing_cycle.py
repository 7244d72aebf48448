"""`structure.Shrinking` of a run that grows: small at first, whole later, the same when resumed."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import schedules, structure, trees
from tests.structure.test_shrinking import GROUPS, NORMED, VARIABLES, X, Y, apply

STEPS, AT = 24, 7
SMALL, LARGE = "small", "large"
KEEP = {name: np.arange(group.size) < group.size // 2 for name, group in GROUPS.items()}
PLAN = GROUPS.plan(KEEP, multiple=1)
OPTIMIZER = optax.adam(0.01)


def make_run(record=None, at=AT, plan=PLAN, base=lambda: VARIABLES, **changes):
    """Returns a run, and the stages that were prepared, each with its thread."""
    prepared = []

    def prepare(stage):
        prepared.append((stage, threading.current_thread()))
        function = stage.wrap(apply)

        @jax.jit
        def step(variables, state):
            def loss(params):
                return jnp.mean((function(variables | {"params": params}, X) - Y) ** 2)

            params = variables["params"]
            updates, state = OPTIMIZER.update(jax.grad(loss)(params), state, params)
            return variables | {"params": optax.apply_updates(params, updates)}, state

        return step

    options = {
        "steps": STEPS,
        "mask_updates": (),
        "cost": structure.mac_cost(GROUPS, apply, VARIABLES, X),
        "make_optimizer": lambda stage: OPTIMIZER,
        "prepare": prepare,
        "functions": {apply: (X,)},
        "policy": structure.Policy(switch_steps=1, delay=2, multiple=1),
        "growth": structure.Growth(at, plan, base),
    }
    return structure.Shrinking(GROUPS, record=record, **(options | changes)), prepared


def train(run, variables, state, first, last, keep=None):
    for step in range(first + 1, last + 1):
        variables, state = run.prepared(variables, state)
        variables, state = run.advance(step, variables, state)
        if keep is not None:
            keep[step] = variables, state, json.loads(json.dumps(run.to_record()))
    return variables, state


def start(run):
    variables = run.stage.network.plan.compact(VARIABLES)
    return variables, run.optimizer.init(variables["params"])


@pytest.fixture(scope="module")
def whole():
    """A run that nothing interrupted: the run, what it prepared, and its state after each step."""
    run, prepared = make_run()
    run.begin()
    kept = {0: (*start(run), json.loads(json.dumps(run.to_record())))}
    train(run, *kept[0][:2], 0, STEPS, kept)
    return run, prepared, kept


@pytest.mark.slow
def test_it_begins_small_and_grows_once(whole):
    run, prepared, kept = whole
    assert [entry["step"] for entry in run.history] == [AT + 2]
    entry = run.history[0]
    assert entry["parameters_before"] == structure.count_parameters(PLAN)
    assert entry["parameters"] == structure.count_parameters(GROUPS.plan({}))
    assert entry["cost_before"] < entry["cost"]
    assert entry["widths"] == {name: group.size for name, group in GROUPS.items()}
    assert run.stage.cut is None and run.stage.groups is GROUPS
    small, large = (jax.tree.map(jnp.shape, tree) for tree in (kept[AT + 1][0], kept[AT + 2][0]))
    assert small == jax.tree.map(jnp.shape, PLAN.compact(VARIABLES)) != large
    assert large == jax.tree.map(jnp.shape, VARIABLES)
    threads = [thread is threading.main_thread() for _, thread in prepared]
    assert threads == [True, False], "the larger step is prepared in the background"


@pytest.mark.slow
def test_the_function_and_the_optimizer_of_old_channels_stay(whole):
    run, _, kept = whole
    small, state, record = kept[AT + 1]
    before, _ = make_run(record)
    before.begin(AT + 1, state)
    small, state = before.prepared(small, state)
    large, grown = before.advance(AT + 2, small, state)
    np.testing.assert_allclose(apply(large, X), PLAN.wrap(apply)(small, X), rtol=1e-4, atol=1e-5)
    assert before.history[0]["difference"] < 1e-5
    assert int(grown[0].count) == int(state[0].count) == AT + 2
    for name in ("mu", "nu"):
        old, new = getattr(state[0], name), getattr(grown[0], name)
        taken = PLAN.compact({"params": new, "shift": VARIABLES["shift"]})["params"]
        jax.tree.map(np.testing.assert_array_equal, taken, old)
        new_entries = jax.tree.map(lambda n, o: n.size - o.size, new, old)
        zeros = jax.tree.map(lambda n: int((n == 0).sum()), new)
        assert all(jax.tree.leaves(jax.tree.map(lambda z, n: z >= n, zeros, new_entries)))
        assert sum(jax.tree.leaves(new_entries)) > 0 and any(
            bool((leaf != 0).any()) for leaf in jax.tree.leaves(old)
        )
    jax.tree.map(np.testing.assert_array_equal, PLAN.compact(large), small)


@pytest.mark.slow
def test_new_channels_learn(whole):
    _, _, kept = whole
    first, last = (trees.leaf_by_path(kept[step][0]) for step in (AT + 2, STEPS))
    moved = {}
    for path, flags in PLAN.kept.items():
        new = np.ones(first[path].shape, bool)
        new[np.ix_(*map(np.flatnonzero, flags))] = False
        if new.any():
            moved[path] = bool((first[path] != last[path])[new].any())
    assert len(moved) >= 5 and all(moved.values()), moved


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, AT - 1, AT, AT + 1, AT + 2, AT + 3, STEPS - 1])
def test_a_resumed_run_ends_with_the_same_bits(whole, step):
    reference, _, kept = whole
    variables, state, record = kept[step]
    run, _ = make_run(record)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(run.stage.network.plan.compact, VARIABLES))
    assert jax.tree.map(jnp.shape, variables) == shapes, "what a checkpoint is restored into"
    run.begin(step, state)
    ends = train(run, variables, state, step, STEPS)
    jax.tree.map(np.testing.assert_array_equal, ends, kept[STEPS][:2])
    times = {"seconds": 0.0}
    assert [own | times for own in run.history] == [own | times for own in reference.history]


@pytest.mark.slow
def test_a_decision_that_was_not_recorded_is_made_again(whole):
    """The checkpoint of a step is saved before the decision of that step."""
    _, _, kept = whole
    variables, state, record = kept[AT]
    assert record["coming"]["grows"] is True
    run, _ = make_run(record | {"coming": None})
    run.begin(AT, state)
    assert run.coming.step == AT + 2 and run.coming.grows and run.coming.resizes
    ends = train(run, variables, state, AT, STEPS)
    jax.tree.map(np.testing.assert_array_equal, ends, kept[STEPS][:2])


@pytest.mark.parametrize(
    ("phase", "steps", "stages"),
    [
        (AT, [9], [(True, SMALL), (False, LARGE)]),
        (AT - 1, [8, 10], [(True, SMALL), (True, LARGE), (False, LARGE)]),
        (AT + 1, [9, 11], [(True, SMALL), (False, SMALL), (False, LARGE)]),
    ],
)
def test_growth_and_a_new_phase_may_share_a_switch(phase, steps, stages):
    run, prepared = make_run(phases={0: SMALL, phase: LARGE})
    run._prepare = lambda stage: prepared.append((stage, None))
    run.begin()
    variables, state = start(run)
    for step in range(1, STEPS + 1):
        assert run.next_step(step - 1) >= step
        variables, state = run.advance(step, variables, state)
    assert [entry["step"] for entry in run.history] == steps
    full = GROUPS[NORMED].size
    found = [(stage.groups[NORMED].size < full, stage.phase) for stage, _ in prepared]
    assert found == stages
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, VARIABLES)


def test_a_network_that_computes_something_else_is_refused_and_nothing_changes():
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), VARIABLES)
    run, _ = make_run(base=lambda: broken, prepare=lambda stage: stage)
    run.begin()
    variables, state = start(run)
    run.advance(AT, variables, state)
    before = run.stage, run.prepared, list(run.history)
    with pytest.raises(ValueError, match="the larger network differs from the present one by nan"):
        run.advance(AT + 2, variables, state)
    assert (run.stage, run.prepared, run.history) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": 0}, "`growth.step` must be at least 1, and at most 20: .*got 0"),
        ({"at": 21}, r"`steps` \(24\) without twice `policy.delay` \(2\); got 21"),
        ({"plan": GROUPS.plan({})}, "`growth.plan` must leave channels out, but keeps all"),
        (
            {"mask_updates": schedules.mask_update_steps(2, 8, 2)},
            "`mask_updates` must be empty with `growth`, but has 4",
        ),
    ],
)
def test_growth_that_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_run(**changes)


@pytest.mark.parametrize("step", [0, AT])
def test_a_record_of_a_run_that_grows_needs_its_growth(whole, step):
    _, _, kept = whole
    with pytest.raises(ValueError, match="`record` is of a run that grows: pass `growth`"):
        make_run(kept[step][2], growth=None)
    make_run(kept[STEPS][2], growth=None)  # it has grown
