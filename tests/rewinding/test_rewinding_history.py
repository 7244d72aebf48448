"""Rewinding in a workdir that holds something else: refused or replaced, never taken for this."""

import functools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune
from jaxprune import budgets, files, rewinding, scores
from jaxprune.rewinding import _history
from jaxprune.rewinding._words import describe

STEPS = 12
CALLS = []  # what the trainings were asked to do
SHARE = 0.25  # a global that rules of the tests read


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def make_task(rate=0.3, seed=0, width=8, steps=STEPS, description="toy", schedule=None):
    """Regression of a linear map; the schedule halves the rate at half of the training."""
    schedule = schedule or optax.piecewise_constant_schedule(rate, {steps // 2: 0.5})
    schedule = rewinding.hold(schedule, steps)
    optimizer = jaxprune.chain(optax.sgd(schedule), jaxprune.fixed_mask_transform())
    inputs = jax.random.normal(jax.random.key(9), (32, 6))
    targets = inputs @ jax.random.normal(jax.random.key(8), (6, 3))

    def loss(params):
        return jnp.mean((inputs @ params["first"] @ params["last"] - targets) ** 2)

    @jax.jit
    def step(state):
        grads = jax.grad(loss)(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def init(number):
        one, two = jax.random.split(jax.random.key(seed + 100 * number))
        params = {
            "first": jax.random.normal(one, (6, width)) / 3,
            "last": jax.random.normal(two, (width, 3)) / 3,
        }
        return {"params": params, "opt_state": optimizer.init(params)}

    def train(state, start, stop, number):
        CALLS.append((number, start, stop))
        for _ in range(start, stop):
            state = step(state)
        return state

    def evaluate(state):
        return -float(loss(state["params"]))

    return rewinding.Task(init, train, evaluate, schedule, steps, description)


def driven(task, workdir, **options):
    """Scores of the dense network and of one round."""
    rounds = rewinding.rewind_learning_rate(task, workdir, [0.5], guard=None, **options)
    return [one.score for one in rounds]


def refused(task, workdir, **options):
    """The message of a refusal that trained nothing."""
    CALLS.clear()
    with pytest.raises(ValueError, match="holds a run with a different configuration") as error:
        driven(task, workdir, **options)
    assert not CALLS
    assert "different `workdir`" in str(error.value) and "`overwrite=True`" in str(error.value)
    return str(error.value)


# ---- the task

CHANGES = {
    "learning rate": ({"rate": 0.03}, "learning rates: 0.30000001192092896 there, 0.0299999"),
    "initial values": ({"seed": 1}, "initial params/first: "),
    "architecture": ({"width": 9}, "initial params/last: float32[8, 3] there, float32[9, 3] now"),
    "length": ({"steps": STEPS + 2}, "steps: 12 there, 14 now"),
    "description": ({"description": {"data": "more"}}, "description: data: absent there, 'more'"),
    "one rate of many": (
        {"schedule": optax.piecewise_constant_schedule(0.3, {STEPS // 2: 0.5, STEPS - 1: 0.5})},
        "learning rates: 0.15000000596046448 there, 0.07500000298023224 now",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_another_task_is_refused_or_replaces_what_was_there(change, tmp_path):
    options, message = CHANGES[change]
    before = driven(make_task(), tmp_path / "a")
    fresh = driven(make_task(**options), tmp_path / "fresh")
    if change != "description":
        assert fresh[0] != before[0]
    assert message in refused(make_task(**options), tmp_path / "a")
    assert driven(make_task(), tmp_path / "a") == before, "what was there is left alone"
    assert driven(make_task(**options), tmp_path / "a", overwrite=True) == fresh
    CALLS.clear()
    assert driven(make_task(**options), tmp_path / "a", overwrite=True) == fresh
    assert not CALLS, "what is of this task is not trained again"
    refused(make_task(), tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_a_half_trained_stage_does_not_become_a_mixture(stage, tmp_path):
    task, fresh = make_task(rate=0.03), driven(make_task(rate=0.03), tmp_path / "fresh")

    def dies(state, start, stop, number):
        if (number, start) == (stage, 8):
            raise KeyboardInterrupt
        return made.train(state, start, stop, number)

    made = make_task(rate=0.3)
    with pytest.raises(KeyboardInterrupt):
        driven(made._replace(train=dies), tmp_path / "a", save_every=4)
    assert "learning rates: 0.3" in refused(task, tmp_path / "a")
    CALLS.clear()
    resumed = driven(made, tmp_path / "a", save_every=4)
    assert CALLS[0] == (stage, 8, STEPS)
    assert resumed == driven(made, tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        driven(made._replace(train=dies), tmp_path / "c", save_every=4)
    assert driven(task, tmp_path / "c", overwrite=True) == fresh


@pytest.mark.slow
def test_the_right_score_of_the_example_in_the_docs(tmp_path):
    """With the rate .03 the program of docs/rewinding.md scores -.178; with .3 it is -.070."""
    text = (Path(__file__).parents[2] / "docs" / "rewinding.md").read_text()
    program = text.partition("```python\n")[2].partition("with tempfile")[0]
    found = {}
    for rate in ("0.3", "0.03"):
        names: dict[str, Any] = {}
        exec(program.replace("cosine_decay_schedule(0.3", f"cosine_decay_schedule({rate}"), names)
        found[rate] = names["task"]
    one = rewinding.train_dense(found["0.3"], tmp_path)
    assert one.score == pytest.approx(-0.0700, abs=2e-3)
    with pytest.raises(ValueError, match=r"learning rates: 0\.3.* there, 0\.029.* now"):
        rewinding.train_dense(found["0.03"], tmp_path)
    other = rewinding.train_dense(found["0.03"], tmp_path, overwrite=True)
    assert other.score == pytest.approx(-0.1784, abs=2e-3)


def test_a_description_is_asked_for():
    with pytest.raises(TypeError, match="description"):
        rewinding.Task(*make_task()[:5])


@pytest.mark.slow
def test_contents_of_a_description_count(tmp_path):
    table = np.arange(6, dtype=np.float32)
    before = driven(make_task(description={"weights": table}), tmp_path)
    assert driven(make_task(description={"weights": jnp.arange(6.0)}), tmp_path) == before, "equal"
    table = table.copy()
    table[3] = -1
    assert "description: weights" in refused(make_task(description={"weights": table}), tmp_path)


def test_a_description_that_says_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"hold plain values(.|\n)*data: a builtins.object"):
        driven(make_task(description={"data": object()}), tmp_path)
    assert not CALLS and not (tmp_path / "dense").exists()


def test_results_without_their_history_are_nobodys(tmp_path):
    driven(make_task(), tmp_path)
    (tmp_path / "dense" / "stage.json").unlink()
    assert "steps: absent there, 12 now" in refused(make_task(), tmp_path)


@pytest.mark.slow
def test_a_history_of_another_kind_is_refused(tmp_path):
    driven(make_task(), tmp_path)
    record = {"history": [f"dense training of {STEPS} steps"], "keep": []}
    (tmp_path / "dense" / "stage.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"stage.json is of version 1, .* or replace that run"):
        driven(make_task(), tmp_path)
    record = files.seal({"version": 2, **record})
    (tmp_path / "dense" / "stage.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="`history` must be an object, but is list"):
        driven(make_task(), tmp_path)


@pytest.mark.parametrize(
    "schedule", [lambda step: 0.3 if step < 6 else 0.15, lambda step: [0.3, 0.15][step >= 6]]
)
def test_a_schedule_in_python_is_called_step_by_step(schedule):
    task = make_task()._replace(schedule=schedule)
    assert _history.differences(_history.of_dense(make_task()), _history.of_dense(task)) == []


def test_another_machine_may_round_differently():
    history = _history.of_dense(make_task())
    near = {
        name: [x * (1 + 1e-6) if isinstance(x, float) else x for x in value]
        if isinstance(value, list)
        else value
        for name, value in history.items()
    }
    assert near != history and _history.differences(near, history) == []
    assert _history.differences(json.loads(json.dumps(history)), history) == []


@pytest.mark.slow
@given(step=st.integers(0, 999), factor=st.sampled_from([0.9, 1.1, 0.0]))
def test_the_rate_of_every_step_counts(step, factor):
    table = np.linspace(1e-3, 2e-3, 1000)
    other = table.copy()
    other[step] *= factor
    found = [
        _history._rates(make_task()._replace(steps=1000, schedule=lambda i, t=t: jnp.asarray(t)[i]))
        for t in (table, other)
    ]
    assert len(found[0]) == 100
    assert _history.differences({"rates": found[0]}, {"rates": found[1]})


# ---- the pruning rule


def rule(score):
    return functools.partial(jaxprune.prune, score=score, budget=budgets.global_budget(0))


def score_arrays(number):
    first, last = jax.random.split(jax.random.key(number))
    return {"first": jax.random.normal(first, (6, 8)), "last": jax.random.normal(last, (8, 3))}


def lambdas(share):
    """Rules of the same module, name and line numbers."""
    by_code = [
        lambda p, s, *, masks: jaxprune.prune(p, s, masks=masks, score=scores.magnitude),
        lambda p, s, *, masks: jaxprune.prune(p, s, masks=masks, score=scores.random(3)),
        lambda p, s, *, masks: jaxprune.prune(p, s, masks=masks, score=scores.random(4)),
    ]
    own = budgets.global_budget(share)
    by_closure = lambda p, s, *, masks: jaxprune.prune(p, s, masks=masks, budget=own)  # noqa: E731
    return [*by_code, by_closure]


def global_rule(params, sparsity, *, masks):
    return jaxprune.prune(params, sparsity, masks=masks, budget=budgets.global_budget(SHARE))


def default_rule(seed):
    def prune(params, sparsity, *, masks, score=scores.random(seed)):  # noqa: B008
        return jaxprune.prune(params, sparsity, masks=masks, score=score)

    return prune


class Rule:
    """A rule that is an object."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, params, sparsity, *, masks):
        return self.prune(params, sparsity, masks=masks)

    def prune(self, params, sparsity, *, masks):
        return jaxprune.prune(params, sparsity, masks=masks, score=scores.random(self.seed))


PAIRS = {
    "score arrays": [lambda: rule(score_arrays(1)), lambda: rule(score_arrays(2))],
    "seeds": [lambda: rule(scores.random(1)), lambda: rule(scores.random(2))],
    "code of lambdas": [lambda: lambdas(0)[0], lambda: lambdas(0)[1]],
    "constants of lambdas": [lambda: lambdas(0)[1], lambda: lambdas(0)[2]],
    "closures of lambdas": [lambda: lambdas(0)[3], lambda: lambdas(1)[3]],
    "defaults": [lambda: default_rule(1), lambda: default_rule(2)],
    "objects": [lambda: Rule(1), lambda: Rule(2)],
    "methods": [lambda: Rule(1).prune, lambda: Rule(2).prune],
    "names": [lambda: "one", lambda: "two"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_another_rule_is_refused_or_replaces_what_was_there(kind, tmp_path):
    one, two = PAIRS[kind]

    def options(make):
        if kind == "names":
            seed = {"one": 1, "two": 2}[make()]
            return {"rule": make(), "prune": lambda *a, **b: rule(scores.random(seed))(*a, **b)}
        return {"prune": make()}

    before = driven(make_task(), tmp_path / "a", **options(one))
    fresh = driven(make_task(), tmp_path / "fresh", **options(two))
    assert fresh[0] == before[0] and fresh[1] != before[1]
    assert "round 1: pruned by" in refused(make_task(), tmp_path / "a", **options(two))
    assert driven(make_task(), tmp_path / "a", **options(one)) == before, "made anew, the same rule"
    assert not CALLS
    assert driven(make_task(), tmp_path / "a", overwrite=True, **options(two)) == fresh
    assert {number for number, _, _ in CALLS} == {1}, "the dense training is shared"


def test_a_global_that_a_rule_reads_counts(tmp_path, monkeypatch):
    driven(make_task(), tmp_path, prune=global_rule)
    monkeypatch.setattr(sys.modules[__name__], "SHARE", 0.75)
    text = refused(make_task(), tmp_path, prune=global_rule)
    assert "SHARE=0.25" in text and "SHARE=0.75" in text


def test_a_rule_that_cannot_be_described_asks_for_a_name(tmp_path):
    generator = np.random.default_rng(0)

    def prune(params, sparsity, *, masks):
        del generator.bit_generator
        return params, masks

    with pytest.raises(ValueError, match="cannot be told from other rules") as error:
        driven(make_task(), tmp_path, prune=prune)
    assert '`rule="..."`' in str(error.value)
    assert "`prune`, `generator`: a numpy.random._generator.Generator" in str(error.value)
    assert not CALLS


@pytest.mark.parametrize("rule", ["", 3])
def test_the_name_of_a_rule_is_a_text(rule, tmp_path):
    with pytest.raises(ValueError, match="`rule` must be a text that names `prune`; got"):
        driven(make_task(), tmp_path, rule=rule)


WORDS = """
import functools, jax.numpy as jnp, numpy as np, jaxprune
from jaxprune import budgets, patterns, scores
from jaxprune.rewinding._words import describe
table = {"b": np.arange(3), "a": {1, "x", None, "y"}}
def rule(params, sparsity, *, masks, kinds=frozenset({"p", "q", "r"})):
    wanted = lambda path: path in {"kernel", "embedding", "scale"} and table
    return jaxprune.prune(params, sparsity, masks=masks, prunable=lambda p, x: wanted(p))
columns = patterns.channels(axis=-1)
whole = functools.partial(rule, budget=budgets.global_budget(0.1), pattern=columns)
problems = []
print(describe([whole, jnp.tanh, table], "it", problems), problems)
"""


def test_words_are_the_same_in_every_process(environment):
    found = set()
    for seed in ("0", "1", "2"):
        run = [sys.executable, "-c", WORDS]
        done = subprocess.run(
            run, env=environment | {"PYTHONHASHSEED": seed}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    (text,) = found
    assert text.rstrip().endswith("[]") and "0x" not in text


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2) | st.floats(0, 1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)


@given(one=plain, two=plain)
def test_words_are_equal_where_values_are(one, two):
    words = [describe(value, "it", []) for value in (one, two)]
    assert (words[0] == words[1]) == (repr_of(one) == repr_of(two))
    assert describe(json.loads(json.dumps(one)), "it", []) == words[0]


def repr_of(value):
    """Like `repr`, without the order of a dict."""
    if isinstance(value, dict):
        return sorted((key, repr_of(part)) for key, part in value.items())
    return [repr_of(part) for part in value] if isinstance(value, list) else repr(value)


@given(
    dtype=st.sampled_from(["float32", "int32", "bfloat16", "bool"]),
    index=st.integers(0, 11),
)
def test_words_of_arrays_are_their_contents(dtype, index):
    array = np.zeros((3, 4), jnp.dtype(dtype))
    other = array.copy()
    other.flat[index] = 1
    words = {describe(each, "it", []) for each in (array, jnp.asarray(array), array.T.copy().T)}
    assert len(words) == 1
    assert words.isdisjoint({describe(each, "it", []) for each in (other, array.reshape(4, 3))})


def test_a_module_of_the_user_counts_with_its_file(tmp_path):
    found = []
    for number in (1, 2):
        (tmp_path / "my_rules_of_pruning.py").write_text(f"NUMBER = {number}\n")
        module = types.ModuleType("my_rules_of_pruning")
        module.__file__ = str(tmp_path / "my_rules_of_pruning.py")
        found.append(describe(module, "it", []))
    assert found[0] != found[1]
    assert describe(np, "it", []) == "module numpy"


# ---- trees that can be called


@flax.struct.dataclass
class Layers:
    """A tree of arrays that is callable, as modules of Equinox are."""

    first: Any
    last: Any

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a tree was called")


def callable_task():
    """The task with its parameters in such a tree."""
    made = make_task()

    def init(number):
        return wrapped(made.init(number))

    def wrapped(state):
        return jax.tree.map(
            lambda node: Layers(**node) if is_params(node) else node, state, is_leaf=is_params
        )

    def plain(state):
        is_layers = lambda node: isinstance(node, Layers)  # noqa: E731
        return jax.tree.map(
            lambda node: vars(node) if is_layers(node) else node, state, is_leaf=is_layers
        )

    def is_params(node):
        return isinstance(node, dict) and "first" in node

    def train(state, start, stop, number):
        return wrapped(made.train(plain(state), start, stop, number))

    return made._replace(init=init, train=train, evaluate=lambda s: made.evaluate(plain(s)))


DRIVERS = {
    "fine_tune": {"steps": 4},
    "rewind_weights": {"to": 2},
    "rewind_learning_rate": {"guard": None},
    "lottery_ticket": {},
    "reinitialize": {},
    "random_masks": {},
    "retrain_dense": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("driver", DRIVERS)
def test_parameters_that_can_be_called_are_a_tree(driver, tmp_path):
    call = functools.partial(getattr(rewinding, driver), **DRIVERS[driver])
    targets = 2 if driver == "retrain_dense" else [0.5, 0.25]
    expected = call(make_task(), tmp_path / "a", targets)
    found = call(callable_task(), tmp_path / "b", targets)
    assert [(a.score, a.density) for a in found] == [(b.score, b.density) for b in expected]


@pytest.mark.slow
@pytest.mark.parametrize("driver", [name for name in DRIVERS if name != "retrain_dense"])
@pytest.mark.parametrize("option", ["score", "prunable", "masks"])
def test_options_that_can_be_called_are_trees(option, driver, tmp_path):
    trees = {"score": score_arrays(1), "prunable": {"first": True, "last": False}}
    trees |= {"masks": jax.tree.map(lambda x: x > 0, score_arrays(2))}

    def prune(kind):
        value = kind(trees[option])
        if option == "masks":
            return lambda params, sparsity, *, masks: (params, value)
        return functools.partial(jaxprune.prune, **{option: value})

    call = functools.partial(getattr(rewinding, driver), **DRIVERS[driver])
    expected = call(make_task(), tmp_path / "a", [0.7], prune=prune(dict))
    found = call(make_task(), tmp_path / "b", [0.7], prune=prune(lambda tree: Layers(**tree)))
    assert [(a.score, a.density) for a in found] == [(b.score, b.density) for b in expected]
    other = {"score": score_arrays(3), "prunable": {"first": False, "last": True}}
    other |= {"masks": jax.tree.map(lambda x: x > 0.5, score_arrays(2))}
    trees |= other
    with pytest.raises(ValueError, match="round 1: pruned by"):
        call(make_task(), tmp_path / "b", [0.7], prune=prune(lambda tree: Layers(**tree)))


def test_a_tree_is_no_rule(tmp_path):
    with pytest.raises(ValueError, match=r"`prune` must be a function, but is a tree \(Layers\)"):
        driven(make_task(), tmp_path, prune=Layers(**score_arrays(1)))


def test_a_state_that_holds_functions_is_named(tmp_path):
    made = make_task()
    task = made._replace(init=lambda n: made.init(n) | {"activation": jnp.tanh, "name": "mlp"})
    with pytest.raises(ValueError, match="must hold arrays and numbers only") as error:
        driven(task, tmp_path)
    assert "activation: " in str(error.value) and "name: str" in str(error.value)


@pytest.mark.slow
def test_modules_of_equinox(tmp_path):
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))
    arrays, static = equinox.partition(model, equinox.is_array)
    schedule = optax.constant_schedule(0.1)
    optimizer = jaxprune.chain(optax.sgd(schedule), jaxprune.fixed_mask_transform())
    inputs = jax.random.normal(jax.random.key(1), (16, 6))

    def loss(params):
        return jnp.mean(jax.vmap(equinox.combine(params, static))(inputs) ** 2)

    @jax.jit
    def step(state):
        updates, opt_state = optimizer.update(
            jax.grad(loss)(state["params"]), state["opt_state"], state["params"]
        )
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def train(state, start, stop, number):
        for _ in range(start, stop):
            state = step(state)
        return state

    def init(number):
        return {"params": arrays, "opt_state": optimizer.init(arrays)}

    task = rewinding.Task(init, train, lambda s: -float(loss(s["params"])), schedule, 4, "mlp")
    random = jax.tree.map(lambda x: jax.random.uniform(jax.random.key(x.size), x.shape), arrays)
    prune = functools.partial(jaxprune.prune, score=random)
    rounds = rewinding.rewind_weights(task, tmp_path, [0.5], to=1, prune=prune)
    assert rounds[1].density == pytest.approx(0.5, abs=0.02)
    again = rewinding.rewind_weights(task, tmp_path, [0.5], to=1, prune=prune)
    assert again == rounds
