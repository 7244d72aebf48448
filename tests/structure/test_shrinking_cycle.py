"""The whole cycle of `structure.Shrinking`: decide, prepare, switch, record, resume."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import schedules, sharding, structure
from tests.structure.test_shrinking import GROUPS, NORMED, VARIABLES, X, Y, apply

STEPS, UPDATES = 40, schedules.mask_update_steps(2, 20, 6)  # masks change after 3, 9, 15, 21
SMALL, LARGE = "small", "large"


def make_optimizer(stage):
    agip = jaxprune.agip_transform(0.6, groups=stage.groups, every=6, start=2, stop=20)
    return jaxprune.chain(optax.sgd(0.05, momentum=0.9), agip)


def make_run(record=None, **changes):
    """Returns a run, and the stages that were prepared, each with its thread."""
    prepared = []

    def prepare(stage):
        prepared.append((stage, threading.current_thread()))
        function, optimizer = stage.wrap(apply), make_optimizer(stage)

        @jax.jit
        def step(variables, state):
            def loss(params):
                return jnp.mean((function(variables | {"params": params}, X) - Y) ** 2)

            params = variables["params"]
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return variables | {"params": optax.apply_updates(params, updates)}, state

        return step

    options = {
        "steps": STEPS,
        "mask_updates": UPDATES,
        "cost": structure.mac_cost(GROUPS, apply, VARIABLES, X),
        "make_optimizer": make_optimizer,
        "prepare": prepare,
        "functions": {apply: (X,)},
        "policy": structure.Policy(switch_steps=1, delay=2, saving=0.05, multiple=1),
        "phases": {0: SMALL, 17: LARGE},
    }
    run = structure.Shrinking(GROUPS, record=record, **(options | changes))
    return run, prepared


def train(run, variables, state, first, last, keep=None):
    for step in range(first + 1, last + 1):
        variables, state = run.prepared(variables, state)
        variables, state = run.advance(step, variables, state)
        if keep is not None:
            keep[step] = variables, state, json.loads(json.dumps(run.to_record()))
    return variables, state


@pytest.fixture(scope="module")
def whole():
    """A run that nothing interrupted: the run, what it prepared, and its state after each step."""
    run, prepared = make_run()
    run.begin()
    kept = {0: (VARIABLES, run.optimizer.init(VARIABLES["params"]), None)}
    train(run, *kept[0][:2], 0, STEPS, kept)
    return run, prepared, kept


@pytest.mark.slow
def test_it_switches_when_masks_have_changed_and_a_phase_begins(whole):
    run, prepared, _ = whole
    # Decided after 9 and 15, and done two steps later; the phase of 17 begins while the second
    # switch is pending, so it is decided on right after that. After 21 nothing is left to remove.
    steps = [entry["step"] for entry in run.history]
    assert steps == [11, 17, 19]
    smaller = [entry["cost"] < entry["cost_before"] for entry in run.history]
    assert smaller == [True, True, False]
    assert [stage.phase for stage, _ in prepared] == [SMALL, SMALL, SMALL, LARGE]
    assert run.stage.cut == 17 and run.stage.groups[NORMED].size == 4
    assert run.history[-1]["parameters"] == structure.count_parameters(run.stage.network.plan)
    assert run.history[2]["parameters"] == run.history[2]["parameters_before"]
    assert all(entry.get("difference", 0) < 1e-4 for entry in run.history)


@pytest.mark.slow
def test_the_next_stage_is_prepared_in_the_background(whole):
    _, prepared, _ = whole
    first, *later = [thread for _, thread in prepared]
    assert first is threading.main_thread()
    assert all(thread is not threading.main_thread() for thread in later)


@pytest.mark.slow
@pytest.mark.parametrize("step", [8, 9, 10, 11, 15, 16, 17, 18, 19, 21, 30])
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
@pytest.mark.parametrize("step", [9, 15])
def test_a_decision_that_was_not_recorded_is_made_again(whole, step):
    """The checkpoint of a step is saved before the decision of that step."""
    _, _, kept = whole
    variables, state, record = kept[step]
    run, _ = make_run(record | {"coming": None})
    run.begin(step, state)
    assert run.coming.step == step + 2
    ends = train(run, variables, state, step, STEPS)
    jax.tree.map(np.testing.assert_array_equal, ends, kept[STEPS][:2])


@pytest.mark.slow
def test_next_step_names_every_step_at_which_something_happens(whole):
    """A loop that calls `advance` at these steps only ends as one that calls it after each."""
    _, _, kept = whole
    run, _ = make_run()
    run.begin()
    variables, state = VARIABLES, run.optimizer.init(VARIABLES["params"])
    step, pauses = 0, []
    while step < STEPS:
        pause = run.next_step(step)
        for _ in range(pause - step):
            variables, state = run.prepared(variables, state)
        variables, state = run.advance(pause, variables, state)
        step = pause
        pauses.append(step)
    assert pauses == [3, 9, 11, 15, 17, 19, 21, 40]
    jax.tree.map(np.testing.assert_array_equal, (variables, state), kept[STEPS][:2])


def test_a_switch_that_is_refused_changes_nothing(whole):
    """The masked network and the smaller one differ: what they compute is not a number."""
    _, _, kept = whole
    variables, state, record = kept[10]
    run, _ = make_run(record)
    run.begin(10, state)
    before = run.stage, run.prepared, list(run.history)
    broken = variables | {"shift": jnp.full(3, jnp.nan)}
    with pytest.raises(ValueError, match="differs from the present one by nan"):
        run.advance(11, broken, state)
    assert (run.stage, run.prepared, run.history) == before


def test_a_switch_is_decided_on_again_if_a_channel_came_back(whole):
    """Masks that regrow may change between the decision and the switch."""
    _, _, kept = whole
    variables, state, record = kept[10]
    run, _ = make_run(record, prepare=lambda stage: stage)
    run.begin(10, state)
    masks, before = run.coming.keep, run.stage
    name = next(n for n, own in masks.items() if own.sum() > 1)
    fewer = masks[name] & (np.arange(len(masks[name])) != np.flatnonzero(masks[name])[0])
    run.coming = run.coming._replace(keep=masks | {name: fewer})
    same = run.advance(11, variables, state)
    assert same[0] is variables and same[1] is state
    assert run.stage is before and run.history == [] and run.coming.step == 13
    jax.tree.map(np.testing.assert_array_equal, dict(run.coming.keep), dict(masks))
    assert run.advance(13, *run.advance(12, *same))[0] is not variables
    assert run.history[0]["step"] == 13


def test_a_step_that_does_not_compile_changes_nothing(whole):
    _, _, kept = whole
    (variables, state, _), record = kept[9], kept[8][2]

    def fails(stage):
        if stage.cut is not None:
            raise ValueError("out of memory")
        return "step"

    run, _ = make_run(record, prepare=fails)
    run.begin(8)
    run.advance(9, variables, state)
    before = run.stage
    with pytest.raises(ValueError, match="out of memory"):
        run.advance(11, variables, state)
    assert run.stage is before and run.history == [] and run.prepared == "step"


def test_without_mask_updates_only_phases_change():
    run, prepared = make_run(mask_updates=())
    run.begin()
    state = run.optimizer.init(VARIABLES["params"])
    for step in range(1, STEPS):
        same = run.advance(step, VARIABLES, state)
        assert same[0] is VARIABLES and same[1] is state
    assert [entry["step"] for entry in run.history] == [19]
    assert run.stage.phase == LARGE and run.stage.cut is None
    assert run.stage.wrap(apply) is apply and len(prepared) == 2


def test_phases_must_begin_at_step_0():
    with pytest.raises(ValueError, match=r"`phases` must have a value for step 0, but has \[5\]"):
        make_run(phases={5: LARGE})


def test_a_step_at_which_something_is_due_cannot_be_left_out(whole):
    _, _, kept = whole
    run, _ = make_run(prepare=lambda stage: stage)
    run.begin()
    with pytest.raises(ValueError, match="`advance` must be done with step 3 before step 4"):
        run.advance(4, *kept[4][:2])
    run, _ = make_run(kept[10][2], prepare=lambda stage: stage)
    run.begin(10, kept[10][1])
    with pytest.raises(ValueError, match="`advance` must be done with step 11 before step 12"):
        run.advance(12, *kept[10][:2])
    assert run.history == [] and run.coming.step == 11


def test_a_checkpoint_of_the_step_of_a_switch_may_be_saved_before_it(whole):
    _, _, kept = whole
    variables, state, record = kept[10]
    run, _ = make_run(record)
    run.begin(10, state)
    before = run.prepared(variables, state)
    resumed, _ = make_run(record, prepare=lambda stage: stage)
    resumed.begin(11, before[1])
    again = resumed.advance(11, *resumed.advance(11, *before))  # the second call does nothing
    jax.tree.map(np.testing.assert_array_equal, again, kept[11][:2])
    with pytest.raises(ValueError, match="step 11 before step 12: .* right after `begin`"):
        resumed, _ = make_run(record, prepare=lambda stage: stage)
        resumed.begin(11, before[1])
        resumed.advance(12, *before)


def test_a_record_of_steps_that_are_arrays_is_plain(whole):
    _, _, kept = whole
    run, _ = make_run(kept[8][2], prepare=lambda stage: stage)
    run.begin(jnp.int32(8), kept[8][1])
    run.advance(jnp.int32(9), *kept[9][:2])
    assert json.loads(json.dumps(run.to_record())) == kept[9][2]


def test_a_switch_needs_a_step_to_be_prepared():
    with pytest.raises(ValueError, match=r"`policy.delay` must be at least 1; got 0"):
        make_run(policy=structure.Policy(switch_steps=1, delay=0))


def test_mask_updates_may_come_in_any_order():
    run, _ = make_run(mask_updates=UPDATES[::-1])
    assert run._changes == [3, 9, 15, 21]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"phase": 2}, "`record` has phase number 2, but `phases` has 2 values"),
        ({"coming": {"step": 9, "keep": None, "phase": 3}}, "`record` has phase number 3"),
        ({"coming": {"step": 9, "keep": {"other:1": [0]}, "phase": 0}}, "of another network"),
    ],
)
def test_a_record_of_another_run_is_refused(changes, match):
    record = make_run()[0].to_record()
    with pytest.raises(ValueError, match=match):
        make_run(record | changes)


@pytest.mark.slow
def test_on_a_mesh_it_switches_at_the_same_steps_to_the_same_channels(whole):
    """Eight devices, the batch split over them; arrays go back to their places after a switch."""
    reference, _, kept = whole
    mesh = sharding.make_mesh()
    x, y = sharding.put((X, Y), sharding.batch_sharding(mesh))

    def prepare(stage):
        function, optimizer = stage.wrap(apply), make_optimizer(stage)

        @jax.jit
        def step(variables, state):
            def loss(params):
                return jnp.mean((function(variables | {"params": params}, x) - y) ** 2)

            params = variables["params"]
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return variables | {"params": optax.apply_updates(params, updates)}, state

        return step

    run, _ = make_run(prepare=prepare)
    run.begin()
    variables = sharding.replicate(VARIABLES, mesh)
    state = sharding.replicate(run.optimizer.init(VARIABLES["params"]), mesh)
    for step in range(1, STEPS + 1):
        variables, state = run.prepared(variables, state)
        variables, state = sharding.replicate(run.advance(step, variables, state), mesh)
    assert [own["step"] for own in run.history] == [own["step"] for own in reference.history]
    assert [own.get("widths") for own in run.history] == [
        own.get("widths") for own in reference.history
    ]
    assert all(leaf.sharding.mesh.size == 8 for leaf in jax.tree.leaves(variables))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(variables),
        jax.device_get(kept[STEPS][0]),
    )
