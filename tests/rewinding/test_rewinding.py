"""Rewinding drivers on a toy training: what each restores, resuming after a kill, bad input."""

import collections
import dataclasses
import functools
import json
import shutil
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState as FlaxState
from hypothesis import given
from hypothesis import strategies as st

import jaxprune
from jaxprune import (
    budgets,
    checkpoints,
    files,
    models,
    patterns,
    rewinding,
    scores,
    sharding,
    trees,
)
from jaxprune.rewinding import Guard, Recipe, Task

STEPS, EARLY = 10, 3
SCHEDULES = {
    "cosine": optax.cosine_decay_schedule(0.1, STEPS),
    "piecewise": optax.piecewise_constant_schedule(0.1, {5: 0.1, 8: 0.1}),
    "warm-up": optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, STEPS),
}
DENSITIES = rewinding.densities(3)


class State(NamedTuple):
    """What the toy training changes; `statistics` stands for those of BatchNorm."""

    params: Any
    statistics: Any
    opt_state: Any


@functools.cache  # so that all toys with one schedule share their compiled step
def optimizer(schedule, mask=None):
    mask = jaxprune.fixed_mask_transform() if mask is None else mask
    sgd = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(schedule, momentum=0.9))
    return jaxprune.chain(sgd, mask)


@functools.cache
def held(schedule):
    return rewinding.hold(schedule, STEPS)


@functools.cache
def step_of(tx, make_state):
    """One training step, compiled."""

    @jax.jit
    def step(state, key):
        inputs = jax.random.normal(key, (16, 6))

        def loss(params):
            first, last = params["first"], params["last"]
            hidden = jnp.tanh(inputs @ first["kernel"] + first["bias"][None])
            return jnp.mean((hidden @ last["kernel"] - 1) ** 2), hidden.mean(0)

        params, statistics, opt_state = fields(state)
        grads, mean = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return make_state(
            params=optax.apply_updates(params, updates),
            statistics=0.9 * statistics + 0.1 * mean,
            opt_state=opt_state,
        )

    return step


class Toy:
    """A regression of random targets as a `Task`, with a diary of what it was asked to do."""

    def __init__(self, schedule=SCHEDULES["cosine"], tx=None, make_state=State):
        self.tx = optimizer(held(schedule)) if tx is None else tx
        self.make_state = make_state
        self.begun = {}  # (round, first step) -> the state that a training started from
        self.calls = []
        self.trained = {}  # (method, round) -> the state it ended with
        self.task = Task(self.init, self.train, self.evaluate, held(schedule), STEPS, "toy")

    def init(self, number):
        keys = jax.random.split(jax.random.key(number), 2)
        params = {
            "first": {"kernel": jax.random.normal(keys[0], (6, 8)), "bias": jnp.zeros(8)},
            "last": {"kernel": jax.random.normal(keys[1], (8, 5))},
        }
        return self.make_state(
            params=params, statistics=jnp.zeros(8), opt_state=self.tx.init(params)
        )

    @property
    def step(self):
        return step_of(self.tx, self.make_state)

    def train(self, state, start, stop, number):
        self.begun.setdefault((number, start), jax.tree.map(jnp.copy, state))
        self.calls.append((number, start, stop))
        for step in range(start, stop):
            state = self.step(state, jax.random.fold_in(jax.random.key(number), step))
        return state

    def evaluate(self, state):
        return float(-jnp.mean((fields(state)[0]["last"]["kernel"] - 1) ** 2))

    def on_round(self, result, state):
        self.trained[result.method, result.number] = state


def fields(state):
    if isinstance(state, dict):
        return state["params"], state["statistics"], state["opt_state"]
    return state.params, state.statistics, state.opt_state


def same(a, b):
    equal = jax.tree.map(np.array_equal, a, b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(equal))


def masks_of(state):
    return jaxprune.get_masks(state.opt_state)


def trace_of(state):
    return optax.tree.get(state.opt_state, "trace")


def dense_at(toy, step):
    """The state of the dense training after some steps, trained without the drivers."""
    return Toy.train(toy, toy.init(0), 0, step, 0)


# ---- the step of the schedule


def wrapped(name, schedule):
    mask = jaxprune.fixed_mask_transform()
    injected = optax.inject_hyperparams(optax.sgd)
    return {
        "chain": lambda: optax.chain(optax.clip(9.0), optax.chain(optax.sgd(schedule)), mask),
        "ours": lambda: jaxprune.chain(optax.sgd(schedule), mask),
        "injected": lambda: optax.chain(injected(learning_rate=schedule), mask),
        "masked": lambda: optax.chain(optax.masked(optax.sgd(schedule), {"kernel": True}), mask),
        "partition": lambda: optax.chain(
            optax.partition({"a": optax.sgd(schedule)}, {"kernel": "a"}), mask
        ),
        "schedule last": lambda: optax.chain(
            optax.scale_by_schedule(lambda step: -schedule(step)), mask
        ),
    }[name]()


WRAPPED = ["chain", "ours", "injected", "masked", "partition", "schedule last"]
DRIVERS = ["fine_tune", "rewind_learning_rate", "rewind_weights"]
# Every pair of an optimizer and a driver, and every pair of each with a schedule.
RATES = [
    (name, driver, list(SCHEDULES)[(i + j) % 3])
    for i, name in enumerate(WRAPPED)
    for j, driver in enumerate(DRIVERS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "driver", "kind"), RATES)
def test_rates_are_exactly_those_of_the_schedule(name, driver, kind, tmp_path):
    schedule = rewinding.hold(SCHEDULES[kind], STEPS)
    tx = wrapped(name, schedule)
    rates = {}

    def init(number):
        params = {"kernel": jnp.ones((2, 4))}
        return {"params": params, "opt_state": tx.init(params)}

    def train(state, start, stop, number):
        for step in range(start, stop):
            ones = {"kernel": jnp.ones((2, 4))}
            updates, opt_state = tx.update(ones, state["opt_state"], state["params"])
            kept = jaxprune.get_masks(opt_state)["kernel"]
            rates[number, step] = {-float(x) for x in updates["kernel"][kept]}
            state = {
                "params": optax.apply_updates(state["params"], updates),
                "opt_state": opt_state,
            }
        return state

    task = Task(init, train, lambda state: 0.0, schedule, STEPS, description={})
    more = {"to": EARLY} if driver.startswith("rewind") else {}
    getattr(rewinding, driver)(task, tmp_path, [0.5, 0.25], **more)
    expected = {(0, step): SCHEDULES[kind](step) for step in range(STEPS)}
    first = STEPS if driver == "fine_tune" else EARLY
    last = 2 * STEPS if driver == "fine_tune" else STEPS
    for number in (1, 2):
        for step in range(first, last):
            expected[number, step] = SCHEDULES[kind](min(step, STEPS - 1))
    assert rates == {key: {float(np.float32(rate))} for key, rate in expected.items()}


@pytest.mark.slow
def test_only_the_schedule_is_set():
    tx = optax.chain(
        optax.adam(SCHEDULES["cosine"]), jaxprune.magnitude_transform(0.5, start=1, stop=3)
    )
    params = {"kernel": jnp.ones((4, 4))}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    rewound = rewinding.set_step(state, 1)
    assert rewinding.steps_of(state) == [3] and rewinding.steps_of(rewound) == [1]
    changed = [
        path
        for (path, a), (_, b) in zip(
            trees.leaves_with_paths(state), trees.leaves_with_paths(rewound), strict=True
        )
        if not np.array_equal(a, b)
    ]
    assert changed == ["0/1/count"], "Adam's count belongs to its moments"
    assert jax.tree.map(jnp.result_type, rewound) == jax.tree.map(jnp.result_type, state)


def test_all_schedules_are_set():
    adamw = optax.adamw(SCHEDULES["cosine"], weight_decay=SCHEDULES["warm-up"])
    parts = {"a": adamw, "b": optax.sgd(SCHEDULES["piecewise"])}
    tx = optax.partition(parts, {"one": "a", "two": "b"})
    params = {"one": jnp.ones((2, 2)), "two": jnp.ones((2, 2))}
    state = tx.init(params)
    _, state = jax.jit(tx.update)(params, state, params)
    rewound = rewinding.set_step(state, 7)
    assert rewinding.steps_of(rewound) == [7, 7, 7]
    assert jax.tree.map(jax.typeof, rewound) == jax.tree.map(jax.typeof, state)


def test_a_schedule_inside_of_accumulation_is_set():
    tx = optax.MultiSteps(optax.sgd(SCHEDULES["cosine"]), 2)
    state = rewinding.set_step(tx.init({"kernel": jnp.ones((2, 2))}), 4)
    assert int(optax.tree.get(state.inner_opt_state, "count")) == 4
    assert int(state.gradient_step) == int(state.mini_step) == 0


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1), optax.adam(0.1), optax.inject_hyperparams(optax.sgd)(0.1)]
)
def test_an_optimizer_without_a_schedule_cannot_be_rewound(tx):
    state = tx.init({"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="holds no step of a learning-rate schedule"):
        rewinding.set_step(state, 3)


def test_steps_are_not_negative():
    state = optax.sgd(SCHEDULES["cosine"]).init({})
    with pytest.raises(ValueError, match="`step` must be at least 0, but is -1"):
        rewinding.set_step(state, -1)


@given(step=st.integers(0, 3 * STEPS), kind=st.sampled_from(sorted(SCHEDULES)))
def test_hold_keeps_the_last_rate(step, kind):
    schedule = SCHEDULES[kind]
    assert rewinding.hold(schedule, STEPS)(step) == schedule(min(step, STEPS - 1))


def test_hold_needs_a_training():
    with pytest.raises(ValueError, match="`steps` must be at least 1, but is 0"):
        rewinding.hold(SCHEDULES["cosine"], 0)


# ---- what each driver restores


def begun(driver, tmp_path, **more):
    """The toy after two rounds, and the state that the second one started from."""
    toy = Toy()
    options = {"on_round": toy.on_round} | more
    rounds = getattr(rewinding, driver)(toy.task, tmp_path, DENSITIES[:2], **options)
    number, start = toy.calls[-1][:2]
    assert number == 2
    return toy, rounds, toy.begun[2, start], start


def check_start(state, params, source, masks, step):
    """Masked weights of `params`; statistics and momentum of `source`; schedule at `step`."""
    assert same(state.params, jaxprune.apply_masks(params, masks))
    assert same(state.statistics, source.statistics)
    assert same(trace_of(state), trace_of(source))
    assert same(masks_of(state), masks)
    assert int(optax.tree.get(state.opt_state, "count")) == step


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["fine_tune", "rewind_learning_rate", "random_masks"])
def test_trained_weights_go_on_with_all_of_their_state(driver, tmp_path):
    toy, _, state, start = begun(driver, tmp_path)
    before = toy.trained[driver, 1]
    check_start(state, before.params, before, masks_of(toy.trained[driver, 2]), start)
    assert start == (STEPS if driver == "fine_tune" else 0)


@pytest.mark.slow
def test_weight_rewinding_restores_the_whole_early_state(tmp_path):
    toy, rounds, state, start = begun("rewind_weights", tmp_path, to=EARLY)
    early = dense_at(toy, EARLY)
    check_start(state, early.params, early, masks_of(toy.trained["rewind_weights", 2]), EARLY)
    assert start == EARLY
    assert [one.total_steps for one in rounds] == [STEPS, 2 * STEPS - EARLY, 3 * STEPS - 2 * EARLY]


def test_a_lottery_ticket_starts_from_the_initial_weights(tmp_path):
    toy, rounds, state, start = begun("lottery_ticket", tmp_path)
    first = toy.init(0)
    check_start(state, first.params, first, masks_of(toy.trained["lottery_ticket", 2]), 0)
    again = rewinding.rewind_weights(Toy().task, tmp_path / "b", DENSITIES[:2], to=0)
    assert [one.score for one in again] == [one.score for one in rounds]


def test_reinitialized_weights_are_new_in_each_round(tmp_path):
    toy, _, state, start = begun("reinitialize", tmp_path)
    new = toy.init(2)
    check_start(state, new.params, new, masks_of(toy.trained["reinitialize", 2]), 0)


def test_early_weights_may_have_the_last_rate(tmp_path):
    toy = Toy()
    recipe = Recipe(weights_from=EARLY, schedule_from=STEPS, steps=4)
    rounds = rewinding.retrain(toy.task, tmp_path, recipe, [0.5], on_round=toy.on_round)
    early = dense_at(toy, EARLY)
    masks = masks_of(toy.trained["retrain", 1])
    check_start(toy.begun[1, STEPS], early.params, early, masks, STEPS)
    assert rounds[-1].total_steps == STEPS + 4


def test_the_dense_control_trains_everything(tmp_path):
    toy = Toy()
    rounds = rewinding.retrain_dense(toy.task, tmp_path, 3, on_round=toy.on_round)
    assert [one.density for one in rounds] == [1.0] * 4
    assert [one.total_steps for one in rounds] == [STEPS * n for n in (1, 2, 3, 4)]
    state = toy.init(0)
    for number in range(4):
        state = state._replace(opt_state=rewinding.set_step(state.opt_state, 0))
        state = Toy.train(toy, state, 0, STEPS, number)
    assert same(state.params, toy.trained["retrain_dense", 3].params)


# ---- masks


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["fine_tune", "rewind_weights", "random_masks", "reinitialize"])
def test_masks_are_nested_and_exact_and_zeros_stay(driver, tmp_path):
    toy = Toy()
    more = {"to": EARLY} if driver == "rewind_weights" else {}
    targets = rewinding.densities(5)
    rounds = getattr(rewinding, driver)(toy.task, tmp_path, targets, on_round=toy.on_round, **more)
    weights = 6 * 8 + 8 * 5
    before = jax.tree.map(jnp.ones_like, masks_of(toy.init(0)))
    for number, target in enumerate(targets, start=1):
        state = toy.trained[driver, number]
        masks = masks_of(state)
        assert abs(rounds[number].density * weights - target * weights) <= 1
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a <= b).all()), masks, before)))
        assert same(state.params, jaxprune.apply_masks(state.params, masks))
        assert masks["first"]["bias"].shape == () and state.params["first"]["bias"].any()
        before = masks


def test_pruning_goes_by_the_trained_weights_of_the_round_before(tmp_path):
    toy = Toy()
    rewinding.rewind_weights(toy.task, tmp_path, DENSITIES, to=EARLY, on_round=toy.on_round)
    for number, target in enumerate(DENSITIES, start=1):
        method = "rewind_weights" if number > 1 else "dense"
        weights = toy.trained[method, number - 1].params
        flat = np.concatenate([np.abs(np.ravel(weights[n]["kernel"])) for n in ("first", "last")])
        threshold = np.sort(flat)[::-1][round(target * flat.size) - 1]
        masks = masks_of(toy.trained["rewind_weights", number])
        for name in ("first", "last"):
            expected = np.abs(weights[name]["kernel"]) >= threshold
            assert np.array_equal(masks[name]["kernel"], expected)


def test_pruning_is_global_without_a_floor():
    params = {"large": jnp.ones((5, 10)), "small": jnp.full((5, 10), 1e-3)}
    _, masks = rewinding.prune_globally(params, 0.5)
    assert int(masks["small"].sum()) == 1, "no leaf is emptied"
    assert int(masks["large"].sum()) == 49


def test_one_shot_prunes_the_dense_network_each_time(tmp_path):
    toy = Toy()
    rounds = rewinding.rewind_learning_rate(
        toy.task, tmp_path, DENSITIES, iterative=False, guard=None, on_round=toy.on_round
    )
    assert [one.total_steps for one in rounds] == [STEPS] + 3 * [2 * STEPS]
    dense = toy.trained["dense", 0].params
    for number, target in enumerate(DENSITIES, start=1):
        _, masks = rewinding.prune_globally(dense, 1 - target)
        held = masks_of(toy.trained["rewind_learning_rate", number])
        assert same(held["first"]["kernel"], masks["first"]["kernel"])
        assert same(held["last"]["kernel"], masks["last"]["kernel"])


@pytest.mark.slow
def test_random_masks_follow_their_seed(tmp_path):
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        toy = Toy()
        rewinding.random_masks(toy.task, tmp_path / name, [0.5], seed=seed, on_round=toy.on_round)
        found[name] = masks_of(toy.trained["random_masks", 1])
    assert same(found["a"], found["b"]) and not same(found["a"], found["c"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        {"budget": budgets.uniform},
        {"score": scores.random(3), "budget": budgets.erdos_renyi_kernel},
        {"pattern": patterns.channels(axis=-1), "budget": budgets.global_budget(0)},
        {"pattern": patterns.n_m(1, 2, axis=-2), "prunable": None},
    ],
    ids=["uniform", "random ERK", "channels", "1:2 of one leaf"],
)
def test_any_rule_of_the_library_prunes(rule, tmp_path):
    if "prunable" in rule:
        rule = rule | {"prunable": lambda path, leaf: path == "first/kernel"}
    mask = jaxprune.fixed_mask_transform(prunable=rule.get("prunable"))
    toy = Toy(tx=optimizer(rewinding.hold(SCHEDULES["cosine"], STEPS), mask))
    targets = [0.5] if "prunable" in rule else [0.5, 0.25]
    rounds = rewinding.fine_tune(
        toy.task, tmp_path, targets, prune=functools.partial(jaxprune.prune, **rule),
        on_round=toy.on_round,
    )  # fmt: skip
    assert rounds[-1].density == pytest.approx(targets[-1], abs=0.05)
    masks = masks_of(toy.trained["fine_tune", len(targets)])
    if "prunable" in rule:
        assert masks["last"]["kernel"].shape == ()
    if isinstance(rule.get("pattern"), patterns.Channels):
        kept = np.asarray(masks["first"]["kernel"])
        assert np.array_equal(kept.any(0), kept.all(0)) and not kept.all()


def test_first_convolution_shortcuts_and_classifier_are_pruned_unless_told():
    model = nnx.eval_shape(lambda: models.resnet8(num_classes=10, in_channels=3, rngs=nnx.Rngs(0)))
    params = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def pruned(**options):
        masks = jaxprune.get_masks(jaxprune.fixed_mask_transform(**options).init(params))
        return {path for path, mask in trees.leaf_by_path(masks).items() if mask.ndim}

    everything = pruned()
    special = {path for path in everything if path.split("/")[0] in ("stem", "head")}
    special |= {path for path in everything if "projection" in path}
    assert {"stem/conv/kernel", "head/kernel"} < special and len(special) > 2
    kernels = {p for p in trees.leaf_by_path(params) if p.endswith("kernel")}
    assert everything == kernels
    assert pruned(prunable=lambda path, leaf: path in kernels - special) == kernels - special


# ---- stages on disk


def stages(folder):
    """Relative folder of each stage -> steps of the checkpoints that it has."""
    return {
        path.parent.relative_to(folder).as_posix(): sorted(
            int(step.name) for step in (path.parent / "checkpoints").glob("*")
        )
        for path in folder.glob("**/round.json")
    }


@pytest.mark.slow
def test_only_needed_checkpoints_stay(tmp_path):
    toy = Toy()
    rounds = rewinding.rewind_weights(toy.task, tmp_path, DENSITIES, to=EARLY, save_every=2)
    assert stages(tmp_path) == {
        "dense": [EARLY, STEPS],
        "rewind_weights/round-1-density-0.8": [],
        "rewind_weights/round-2-density-0.64": [],
        "rewind_weights/round-3-density-0.512": [STEPS],
    }
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(toy.task.init(0)))
    # Two checkpoints of the dense training, one of each later stage when it is done.
    assert [one.checkpoint_bytes for one in rounds] == [2 * state, state, state, state]


@pytest.mark.slow
def test_a_finished_stage_is_not_trained_again(tmp_path):
    first = rewinding.fine_tune(Toy().task, tmp_path, DENSITIES[:2])
    toy = Toy()
    again = rewinding.fine_tune(toy.task, tmp_path, DENSITIES)
    assert again[:3] == first
    assert {number for number, _, _ in toy.calls} == {3}
    fresh = rewinding.fine_tune(Toy().task, tmp_path / "fresh", DENSITIES)
    assert [one.score for one in fresh] == [one.score for one in again]


class Killed(Exception):
    """Stands for a kill: nothing in the drivers catches it."""


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["fine_tune", "rewind_weights", "rewind_learning_rate"])
def test_a_killed_run_ends_with_the_same_bits(driver, tmp_path):
    more = {"to": EARLY} if driver == "rewind_weights" else {}
    more |= {"save_every": 4}
    whole = Toy()
    expected = getattr(rewinding, driver)(
        whole.task, tmp_path / "whole", DENSITIES[:2], on_round=whole.on_round, **more
    )
    assert len(whole.calls) > 6, "no kill inside of a round"
    assert len(whole.trained) == 3

    stride = 2 if driver == "rewind_weights" else 4
    for kill_at in range(1, 2 * len(whole.calls) + 1, stride):
        toy = Toy()
        count = [0]

        def mortal(function, count=count, kill_at=kill_at):
            def call(*args):
                count[0] += 1
                if count[0] == kill_at:
                    raise Killed
                return function(*args)

            return call

        # Also between the last step of a stage and its result.
        task = toy.task._replace(train=mortal(toy.train), evaluate=mortal(toy.evaluate))
        options = {"on_round": mortal(toy.on_round)} | more
        folder = tmp_path / str(kill_at)
        for _ in range(2):
            try:
                found = getattr(rewinding, driver)(task, folder, DENSITIES[:2], **options)
            except Killed:
                continue
        assert found == expected
        assert toy.trained.keys() == whole.trained.keys()  # no result without its hook
        for key, state in toy.trained.items():
            assert same(state, whole.trained[key]), (kill_at, key)
        shutil.rmtree(folder)


def test_drivers_share_the_dense_training(tmp_path):
    toy = Toy()
    rewinding.train_dense(toy.task, tmp_path, keep=[EARLY])
    rewinding.fine_tune(toy.task, tmp_path, [0.5])
    rewinding.rewind_weights(toy.task, tmp_path, [0.5], to=EARLY)
    assert [call for call in toy.calls if call[0] == 0] == [(0, 0, EARLY), (0, EARLY, STEPS)]


# ---- the guard


class Bad(Toy):
    """A toy that gets worse whenever it keeps trained weights."""

    def evaluate(self, state):
        kept = masks_of(state)["first"]["kernel"].mean()
        rewound = any(number and start for number, start, _ in self.calls[-1:])
        return float(1.0 if rewound else kept)


def test_the_guard_says_what_it_saw(tmp_path):
    toy = Bad()
    with pytest.warns(UserWarning, match="rewind_learning_rate lost .* at density 0.795"):
        rounds = rewinding.rewind_learning_rate(toy.task, tmp_path, DENSITIES[:1])
    assert "more than the margin of 0.01" in rounds[1].note
    assert rounds[1].total_steps == 2 * STEPS


def test_the_guard_can_rewind_weights(tmp_path):
    toy = Bad()
    guard = Guard(weights_from=EARLY)
    with pytest.warns(UserWarning, match=f"the weights are rewound to step {EARLY}"):
        rounds = rewinding.rewind_learning_rate(toy.task, tmp_path, DENSITIES[:2], guard=guard)
    long, short = STEPS, STEPS - EARLY
    assert [one.total_steps for one in rounds] == [long, 2 * long + short, 2 * long + 2 * short]
    assert [bool(one.note) for one in rounds] == [False, True, False]
    first = "rewind_learning_rate/round-1-density-0.8"
    assert stages(tmp_path) == {
        "dense": [EARLY, STEPS],
        first: [],
        f"{first}-weights-{EARLY}": [],
        f"rewind_learning_rate/round-2-density-0.64-weights-{EARLY}": [STEPS],
    }
    masked = jaxprune.apply_masks(dense_at(toy, EARLY).params, masks_of(toy.begun[2, EARLY]))
    assert same(toy.begun[2, EARLY].params, masked)
    with pytest.warns(UserWarning, match="lost"):
        again = rewinding.rewind_learning_rate(Bad().task, tmp_path, DENSITIES[:2], guard=guard)
    assert again == rounds


class Falling(Toy):
    """Its score is what is left, in 64ths: exact numbers."""

    def evaluate(self, state):
        kept = sum(int(masks_of(state)[name]["kernel"].sum()) for name in ("first", "last"))
        return kept / 64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guard", "harmed"),
    [
        (Guard(margin=44 / 64), []),  # a loss of exactly the margin is none
        (Guard(margin=43.9 / 64), [2]),
        (Guard(margin=21 / 64, density=0.75), [1]),  # the density counts itself
        (Guard(margin=23 / 64, density=0.5), [2]),  # against the dense network, not the last
        (Guard(margin=0, density=0.51), [1]),
    ],
)
def test_what_counts_as_harm(guard, harmed, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rounds = rewinding.rewind_learning_rate(
            Falling().task, tmp_path, [0.75, 0.5, 0.25], guard=guard
        )
    assert [one.number for one in rounds if one.note] == harmed
    assert {warning.filename for warning in caught} <= {__file__}
    assert len(caught) == len(harmed)


def test_the_guard_goes_by_the_density_that_was_asked_for(tmp_path):
    guard = Guard(margin=0, density=0.55)
    with pytest.warns(UserWarning, match="lost"):
        rounds = rewinding.rewind_learning_rate(Falling().task, tmp_path, [0.55], guard=guard)
    assert rounds[1].density < 0.55, "48 of 88 weights"


def test_rewound_weights_are_not_harmed_again(tmp_path):
    guard = Guard(margin=0.1, density=0.1, weights_from=EARLY)
    with pytest.warns(UserWarning, match="lost") as caught:
        rounds = rewinding.rewind_learning_rate(
            Falling().task, tmp_path, [0.75, 0.5, 0.25], guard=guard
        )
    assert len(caught) == 1 and [bool(one.note) for one in rounds] == [False, True, False, False]


@pytest.mark.slow
def test_a_guard_can_be_given_to_an_existing_run(tmp_path):
    silent = rewinding.rewind_learning_rate(Bad().task, tmp_path, DENSITIES[:2], guard=None)
    with pytest.warns(UserWarning, match="are rewound to step 0"):
        rounds = rewinding.rewind_learning_rate(
            Bad().task, tmp_path, DENSITIES[:2], guard=Guard(weights_from=0)
        )
    assert rounds[1].total_steps == silent[1].total_steps + STEPS
    # The old rounds can still be added to.
    more = rewinding.rewind_learning_rate(Bad().task, tmp_path, DENSITIES, guard=None)
    assert more[: len(silent)] == silent


@pytest.mark.parametrize("guard", [None, Guard(margin=0.9), Guard(density=0.9)])
def test_the_guard_is_silent_where_nothing_is_wrong(guard, tmp_path):
    rounds = rewinding.rewind_learning_rate(Bad().task, tmp_path, DENSITIES[:1], guard=guard)
    assert rounds[1].note == ""


# ---- what a folder stands for


def killed_at_step_5(toy):
    """The task of a toy, which dies there."""

    def train(state, start, stop, number):
        if start == 5:
            raise Killed
        return toy.train(state, start, stop, number)

    return toy.task._replace(train=train)


@pytest.mark.slow
def test_an_early_checkpoint_outlives_another_driver(tmp_path):
    toy = Toy()
    options = {"save_every": 5}
    with pytest.raises(Killed):
        task = killed_at_step_5(toy)
        rewinding.rewind_weights(task, tmp_path, [0.5], to=EARLY, **options)
    rewinding.fine_tune(toy.task, tmp_path, [0.5], **options)
    found = rewinding.rewind_weights(toy.task, tmp_path, [0.5], to=EARLY, **options)
    fresh = rewinding.rewind_weights(Toy().task, tmp_path / "b", [0.5], to=EARLY, **options)
    assert found[-1].score == fresh[-1].score


def test_a_step_that_a_stopped_training_went_past(tmp_path):
    toy = Toy()
    with pytest.raises(Killed):
        rewinding.train_dense(killed_at_step_5(toy), tmp_path, save_every=5)
    call = functools.partial(rewinding.rewind_weights, densities=[0.5], to=EARLY)
    refused(f"must have a checkpoint of step {EARLY}", tmp_path, lambda *a: call(*a))


@pytest.mark.slow
@pytest.mark.parametrize("change", ["seed", "rule", "earlier density", "lambda"])
def test_rounds_of_another_rule_are_refused(change, tmp_path):
    calls = {
        "seed": [
            lambda *a: rewinding.random_masks(*a, [0.5], seed=0),
            lambda *a: rewinding.random_masks(*a, [0.5], seed=1),
        ],
        "rule": [
            lambda *a: rewinding.fine_tune(*a, [0.5]),
            lambda *a: rewinding.fine_tune(
                *a, [0.5], prune=functools.partial(jaxprune.prune, budget=budgets.uniform)
            ),
        ],
        "earlier density": [
            lambda *a: rewinding.fine_tune(*a, [0.8, 0.5]),
            lambda *a: rewinding.fine_tune(*a, [0.7, 0.5], iterative=True),
        ],
        "lambda": [
            lambda *a: rewinding.fine_tune(*a, [0.5], prune=floor(0.1)),
            lambda *a: rewinding.fine_tune(*a, [0.5], prune=floor(0.2)),
        ],
    }[change]
    calls[0](Toy().task, tmp_path)
    if change == "earlier density":  # another folder for round 1, the same for round 2
        with pytest.raises(ValueError, match="a different configuration"):
            calls[1](Toy().task, tmp_path)
    else:
        refused("a different configuration", tmp_path, calls[1])
    calls[0](Toy().task, tmp_path)


def floor(share):
    rule = budgets.global_budget(share)
    return lambda params, sparsity, *, masks: jaxprune.prune(
        params, sparsity, budget=rule, masks=masks
    )


def test_weights_that_pruning_changed_are_used(tmp_path):
    def prune(params, sparsity, *, masks):
        pruned, masks = rewinding.prune_globally(params, sparsity, masks=masks)
        return jax.tree.map(lambda leaf: 2 * leaf, pruned), masks

    toy = Toy()
    rewinding.fine_tune(toy.task, tmp_path, [0.5], prune=prune, on_round=toy.on_round)
    expected, _ = rewinding.prune_globally(toy.trained["dense", 0].params, 0.5)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, expected)
    assert same(toy.begun[1, STEPS].params, doubled)


# ---- devices and types


@pytest.mark.slow
def test_states_keep_their_shardings_and_their_freedom(tmp_path):
    mesh = sharding.make_mesh()
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    class Sharded(Toy):
        def init(self, number):
            state = super().init(number)
            place = functools.partial(jax.device_put, device=whole)
            params = jax.tree.map(place, state.params)
            params["last"]["kernel"] = jax.device_put(params["last"]["kernel"], spread)
            statistics = jax.device_put(state.statistics, spread)
            return State(params, statistics, jax.tree.map(place, self.tx.init(params)))

        def train(self, state, start, stop, number):
            assert state.params["last"]["kernel"].sharding == spread
            assert state.statistics.sharding == spread
            return super().train(state, start, stop, number)

    def moves(params, sparsity, *, masks):
        pruned = rewinding.prune_globally(params, sparsity, masks=masks)
        return jax.device_put(pruned, jax.devices()[1])

    for number, options in enumerate([{}, {"prune": moves}]):
        task, folder = Sharded().task, tmp_path / str(number)
        rewinding.rewind_weights(task, folder, DENSITIES[:2], to=EARLY, **options)
        rewinding.fine_tune(task, folder, DENSITIES[:2], **options)

    class Free(Toy):
        def train(self, state, start, stop, number):
            assert not any(leaf.committed for leaf in jax.tree.leaves(state))
            jax.jit(jnp.sum)(jax.device_put(jnp.ones(8), spread) * state.statistics)
            return super().train(state, start, stop, number)

    rewinding.rewind_weights(Free().task, tmp_path / "free", DENSITIES[:2], to=EARLY)


@pytest.mark.slow
def test_weak_types_and_python_numbers_do_not_change_a_resumed_run(tmp_path):
    scores = []
    for every in (2, STEPS):
        toy = Toy(make_state=dict)
        init, seen = toy.init, []

        def with_extras(number, init=init):
            return init(number) | {"weak": jnp.asarray(1.1), "python": 3}

        def train(state, start, stop, number, toy=toy, seen=seen):
            seen.append(jnp.result_type(state["weak"] * jnp.ones((), jnp.bfloat16)))
            extras = {name: state[name] for name in ("weak", "python")}
            own = {name: leaf for name, leaf in state.items() if name not in extras}
            return toy.train(own, start, stop, number) | extras

        task = toy.task._replace(init=with_extras, train=train)
        rounds = rewinding.fine_tune(task, tmp_path / str(every), [0.5], save_every=every)
        scores.append([one.score for one in rounds])
        assert set(seen) == {jnp.dtype("float32")}
    assert scores[0] == scores[1]


# ---- states of other loops


class OtherFlaxState(FlaxState):
    """Flax's own, with statistics."""

    statistics: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DataState:
    """A dataclass."""

    params: Any
    statistics: Any
    opt_state: Any


def flax_state(**named):
    # As `TrainState.create` makes it: the step is a Python integer.
    return OtherFlaxState(step=0, apply_fn=len, tx=optax.sgd(1), **named)


@pytest.mark.slow
@pytest.mark.parametrize("make_state", [dict, DataState, flax_state, collections.OrderedDict])
def test_any_state_with_the_two_fields(make_state, tmp_path):
    expected = rewinding.rewind_weights(Toy().task, tmp_path / "a", DENSITIES[:2], to=EARLY)
    toy = Toy(make_state=make_state)
    found = rewinding.rewind_weights(toy.task, tmp_path / "b", DENSITIES[:2], to=EARLY)
    assert [one.score for one in found] == [one.score for one in expected]


# ---- bad input


def refused(message, tmp_path, call, toy=None, kind=ValueError):
    """The error of a call, which has trained nothing."""
    toy = toy or Toy()
    with pytest.raises(kind, match=message) as error:
        call(toy.task, tmp_path)
    assert not toy.calls
    return str(error.value)


@pytest.mark.parametrize(
    "densities", [[], [1.0, 0.5], [0.5, 0.5], [0.4, 0.5], [0.5, 0.0], [-0.1], [float("nan")]]
)
def test_densities_must_fall(densities, tmp_path):
    text = refused("`densities` must", tmp_path, lambda *a: rewinding.fine_tune(*a, densities))
    assert str(densities) in text


@pytest.mark.parametrize(("rounds", "rate"), [(0, 0.2), (3, 0.0), (3, 1.0)])
def test_rounds_and_rate_have_limits(rounds, rate):
    with pytest.raises(ValueError, match="must be at least 1|must lie in"):
        rewinding.densities(rounds, rate)


@given(rounds=st.integers(1, 20), rate=st.floats(0.05, 0.9))
def test_each_round_prunes_the_same_fraction(rounds, rate):
    found = np.array([1.0, *rewinding.densities(rounds, rate)])
    np.testing.assert_allclose(found[1:] / found[:-1], 1 - rate, rtol=1e-9)


@pytest.mark.parametrize("to", [-1, STEPS, STEPS + 1])
@pytest.mark.parametrize("driver", ["rewind_weights", "rewind_learning_rate", "random_masks"])
def test_a_step_beyond_the_training(driver, to, tmp_path):
    call = getattr(rewinding, driver)
    refused(f"has {STEPS} steps", tmp_path, lambda *a: call(*a, [0.5], to=to))


@pytest.mark.parametrize("to", [0.3, True, "2", None])
@pytest.mark.parametrize("driver", ["rewind_weights", "rewind_learning_rate", "retrain_dense"])
def test_a_step_that_is_no_number(driver, to, tmp_path):
    call, rounds = getattr(rewinding, driver), 1 if driver == "retrain_dense" else [0.5]
    refused("must be a number of steps", tmp_path, lambda *a: call(*a, rounds, to=to))


def test_numbers_may_be_those_of_numpy(tmp_path):
    toy = Toy()
    task = toy.task._replace(steps=np.int64(STEPS))
    found = rewinding.rewind_weights(
        task, tmp_path, np.array([0.5, 0.25], np.float32), to=np.int32(EARLY)
    )
    again = rewinding.rewind_weights(Toy().task, tmp_path, [0.5, 0.25], to=EARLY)
    assert found == again


@pytest.mark.parametrize(
    "recipe", [Recipe("train", 0, 5), Recipe(STEPS + 1, 0, 5), Recipe(0, 0, 2.5)]
)
def test_recipes_that_mean_nothing(recipe, tmp_path):
    message = "must be a number of steps|it has no such step"
    refused(message, tmp_path, lambda *a: rewinding.retrain(*a, recipe, [0.5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_evry": 2}, "unexpected keyword `save_evry`; did you mean `save_every`"),
        ({"to": 3}, "unexpected keyword `to`; use one of name"),
        ({"save_every": 0}, "`save_every` must be at least 1, but is 0"),
        ({"save_every": -5}, "`save_every` must be at least 1, but is -5"),
        ({"name": "dense"}, "`name` must be a folder name other than `dense`"),
        ({"name": "a/b"}, "`name` must be a folder name"),
        ({"name": ""}, "`name` must be a folder name"),
    ],
)
def test_bad_options(options, message, tmp_path):
    kind = TypeError if "unexpected" in message else ValueError
    call = functools.partial(rewinding.fine_tune, densities=[0.5], **options)
    refused(message, tmp_path, lambda *a: call(*a), kind=kind)


def test_retraining_the_dense_network_needs_a_round(tmp_path):
    refused("`rounds` must be at least 1", tmp_path, lambda *a: rewinding.retrain_dense(*a, 0))


def test_the_dense_control_goes_back_to_where_it_is_told(tmp_path):
    toy = Toy()
    rewinding.retrain_dense(toy.task, tmp_path, 1, to=EARLY)
    assert toy.calls[-1] == (1, EARLY, STEPS)


def test_accumulated_steps_must_be_counted_as_updates(tmp_path):
    schedule = rewinding.hold(SCHEDULES["cosine"], STEPS)
    tx = optax.chain(optax.MultiSteps(optax.sgd(schedule), 2), jaxprune.fixed_mask_transform())
    with pytest.raises(ValueError, match="the schedule stands at step 1 after it"):
        rewinding.rewind_weights(Toy(tx=tx).task, tmp_path, [0.5], to=EARLY)


def test_an_optimizer_that_prunes_by_itself(tmp_path):
    prune = jaxprune.magnitude_transform(0.9, start=0, stop=5, every=1)
    toy = Toy(tx=optimizer(rewinding.hold(SCHEDULES["cosine"], STEPS), prune))
    with pytest.raises(ValueError, match="the dense training has pruned"):
        rewinding.fine_tune(toy.task, tmp_path, [0.5])


def test_a_mask_for_a_leaf_that_the_optimizer_does_not_prune(tmp_path):
    mask = jaxprune.fixed_mask_transform(prunable=lambda path, leaf: path == "first/kernel")
    toy = Toy(tx=optimizer(rewinding.hold(SCHEDULES["cosine"], STEPS), mask))
    text = refused("masks", tmp_path, lambda *a: rewinding.fine_tune(*a, [0.5]), toy)
    assert "last/kernel: pruned, but the optimizer does not prune it" in text


def test_a_schedule_that_starts_again_after_its_end(tmp_path):
    cycles = optax.join_schedules([SCHEDULES["cosine"]] * 2, [STEPS])
    task = Toy().task._replace(schedule=cycles)
    with pytest.raises(ValueError, match="at step 10"):
        rewinding.fine_tune(task, tmp_path, [0.5])
    # Rewinding does not go there.
    tx = optimizer(SCHEDULES["cosine"])
    unheld = Toy(tx=tx).task._replace(schedule=SCHEDULES["cosine"])
    rewinding.rewind_learning_rate(unheld, tmp_path, [0.5], guard=None)


def test_a_guard_beyond_the_training(tmp_path):
    guard = Guard(weights_from=STEPS + 1)
    call = rewinding.rewind_learning_rate
    refused(f"has {STEPS} steps", tmp_path, lambda *a: call(*a, [0.5], guard=guard))


def test_a_missing_early_checkpoint_names_its_step(tmp_path):
    rewinding.fine_tune(Toy().task, tmp_path, [0.5])
    text = refused(
        f"must have a checkpoint of step {EARLY}",
        tmp_path,
        lambda *a: rewinding.rewind_weights(*a, [0.5], to=EARLY),
    )
    assert f"keep=[{EARLY}]" in text
    with pytest.raises(ValueError, match="`keep` must be a number of steps, but is 0.5"):
        rewinding.train_dense(Toy().task, tmp_path / "b", keep=[0.5])
    with pytest.raises(ValueError, match=r"`keep` must hold steps .* got \[99\]"):
        rewinding.train_dense(Toy().task, tmp_path / "b", keep=[99])


def test_a_schedule_that_moves_after_its_end(tmp_path):
    toy = Toy()
    task = toy.task._replace(schedule=SCHEDULES["cosine"])
    with pytest.raises(ValueError, match=r"with `rewinding.hold\(schedule, steps\)`"):
        rewinding.fine_tune(task, tmp_path, [0.5])
    assert not toy.calls


def test_an_optimizer_that_cannot_be_rewound(tmp_path):
    toy = Toy(tx=optimizer(0.1))
    refused("nothing to rewind", tmp_path, lambda *a: rewinding.fine_tune(*a, [0.5]), toy=toy)


def test_an_optimizer_without_masks(tmp_path):
    toy = Toy(tx=optimizer(SCHEDULES["cosine"], optax.identity()))
    refused("holds no masks", tmp_path, lambda *a: rewinding.fine_tune(*a, [0.5]), toy=toy)


def test_masks_of_another_model(tmp_path):
    def prune(params, sparsity, *, masks):
        return params, {"other": jnp.ones((2, 2), bool)}

    text = refused("masks", tmp_path, lambda *a: rewinding.fine_tune(*a, [0.5], prune=prune))
    assert "other: a mask without a leaf" in text and "first/kernel: no mask" in text


def test_a_workdir_of_another_run(tmp_path):
    rewinding.fine_tune(Toy().task, tmp_path, DENSITIES[:1], steps=4)
    call = functools.partial(rewinding.fine_tune, densities=DENSITIES[:1], steps=5)
    refused("holds a run with a different configuration", tmp_path, lambda *a: call(*a))
    longer = Toy().task._replace(steps=STEPS - 1)
    with pytest.raises(ValueError, match="holds a run with a different configuration"):
        rewinding.train_dense(longer, tmp_path)


def test_checkpoints_of_another_model(tmp_path):
    rewinding.train_dense(Toy().task, tmp_path)
    toy = Toy()
    wide = toy.task._replace(init=lambda number: toy.init(number)._replace(statistics=jnp.ones(9)))
    with pytest.raises(ValueError, match="initial statistics: float32.8. there, float32.9. now"):
        rewinding.fine_tune(wide, tmp_path, [0.5])


def test_rounds_whose_checkpoint_is_gone(tmp_path):
    rewinding.fine_tune(Toy().task, tmp_path, DENSITIES[:2])
    refused(
        "must have a checkpoint for a round",
        tmp_path,
        lambda *a: rewinding.fine_tune(*a, [DENSITIES[0], 0.5]),
    )


def test_a_state_without_the_fields(tmp_path):
    toy = Toy()
    task = toy.task._replace(init=lambda number: {"params": {}}, train=lambda state, *_: state)
    with pytest.raises(ValueError, match="dict has no `opt_state`"):
        rewinding.fine_tune(task, tmp_path, [0.5])


@pytest.mark.slow
def test_a_training_that_diverges_keeps_what_was_there(tmp_path):
    toy = Toy()

    def train(state, start, stop, number):
        state = toy.train(state, start, stop, number)
        if number and stop == 8:
            return state._replace(params=jax.tree.map(lambda x: x / 0, state.params))
        return state

    task = toy.task._replace(train=train)
    with pytest.raises(ValueError, match="4 to 8: the parameters are not finite; lower the"):
        rewinding.rewind_learning_rate(task, tmp_path, [0.5], save_every=4)
    found = rewinding.rewind_learning_rate(toy.task, tmp_path, [0.5], save_every=4)
    expected = rewinding.rewind_learning_rate(Toy().task, tmp_path / "b", [0.5], save_every=4)
    assert found[-1].score == expected[-1].score


def test_a_score_that_is_not_a_number(tmp_path):
    task = Toy().task._replace(evaluate=lambda state: float("nan"))
    with pytest.raises(ValueError, match="must return a finite number, but returned nan"):
        rewinding.train_dense(task, tmp_path)


def flipped(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "round.json").write_text("{"), r"round\.json is damaged \("),
        (
            lambda folder: flipped(folder / "round.json", '"steps": 10', '"steps": 11'),
            r"round\.json is damaged: its content does not have its checksum",
        ),
        (
            lambda folder: flipped(folder / "stage.json", '"keep": []', '"keep": [4]'),
            r"stage\.json is damaged: its content does not have its checksum",
        ),
        (
            lambda folder: flipped(folder / "round.json", '"version": 2', '"version": 1'),
            r"round\.json is of version 1, but this jaxprune reads 2: use a different",
        ),
        (lambda folder: (folder / "stage.json").write_text("[]"), r"stage\.json is of version 1"),
    ],
)
def test_damaged_records_are_errors_and_can_be_overwritten(damage, match, tmp_path):
    done = rewinding.train_dense(Toy().task, tmp_path)
    damage(tmp_path / "dense")
    with pytest.raises(ValueError, match=match):
        rewinding.train_dense(Toy().task, tmp_path)
    toy = Toy()
    assert rewinding.train_dense(toy.task, tmp_path, overwrite=True) == done
    assert toy.calls
    assert rewinding.train_dense(Toy().task, tmp_path) == done


def test_one_process_at_a_time_trains_a_stage(tmp_path):
    toy = Toy()

    def train(*args):
        with pytest.raises(ValueError, match="the stage .*dense is in use by process"):
            rewinding.train_dense(Toy().task, tmp_path)
        return toy.train(*args)

    done = rewinding.train_dense(toy.task._replace(train=train), tmp_path)
    with files.locked(tmp_path / "dense"):  # what is done is read, whoever has the lock
        assert rewinding.train_dense(Toy().task, tmp_path) == done
    assert not (tmp_path / "dense" / ".lock").exists()


def test_a_stage_that_is_deleted_in_mid_training_is_an_error(tmp_path):
    toy = Toy()

    def train(*args):
        shutil.rmtree(tmp_path / "dense")
        return toy.train(*args)

    with pytest.raises(ValueError, match="the stage .*dense was deleted, moved or replaced while"):
        rewinding.train_dense(toy.task._replace(train=train), tmp_path)
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("name", ["..", ".", "", "dense", "a/b", "/tmp", "a\\b", "a\0", None, 3])
def test_rounds_are_written_in_the_workdir(name, tmp_path):
    with pytest.raises(
        ValueError, match=r"`name` must be a folder name other than `dense`, `.` and `..`; got "
    ):
        rewinding.fine_tune(Toy().task, tmp_path / "workdir", [0.5], name=name)
    assert not list(tmp_path.iterdir())


def test_a_half_deleted_checkpoint_is_left_for_the_one_before(tmp_path):
    whole = Toy()
    expected = rewinding.train_dense(whole.task, tmp_path / "whole", keep=[EARLY])
    folder = tmp_path / "run" / "dense"
    toy = Toy()
    rewinding.train_dense(toy.task, tmp_path / "run", keep=[EARLY])
    (folder / "round.json").unlink()
    shutil.rmtree(folder / "checkpoints" / str(STEPS) / "state")
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    again = Toy()
    with pytest.warns(UserWarning, match=rf"renamed to {STEPS}\.damaged, and the one before it"):
        assert rewinding.train_dense(again.task, tmp_path / "run", keep=[EARLY]) == expected
    assert again.calls == [(0, EARLY, STEPS)]
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {str(EARLY), str(STEPS), f"{STEPS}.damaged"}


def test_results_are_json(tmp_path):
    done = rewinding.train_dense(Toy().task, tmp_path)
    path = tmp_path / "dense" / "round.json"
    content = files.unseal(json.loads(path.read_text()), "")
    assert content == {"version": 2, **done._asdict()}
    assert rewinding.read_round(path) == done
    assert rewinding.read_round(tmp_path / "nowhere.json") is None
    stage = checkpoints.read_json(tmp_path / "dense" / "stage.json")
    history = stage["history"]
    assert stage["keep"] == [] and history["steps"] == str(STEPS)
    assert history["description"] == "'toy'" and len(history["learning rates"]) == STEPS
    kernel = Toy().init(0).params["first"]["kernel"]
    assert history["initial params/first/kernel"] == [
        "float32[6, 8]",
        pytest.approx(float(jnp.linalg.norm(kernel))),
    ]
