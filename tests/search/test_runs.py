"""The driver of all searches: one program, the journal, resuming, bad input."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import search, sharding, structure
from tests.support.searching import chain, planted, problem_of

OWN = planted()
PROBLEM = problem_of(OWN)
SMALL = search.Settings(hidden=(8, 8), batch=8)
SEARCHES = {
    "uniform": search.uniform,
    "ranking": search.ranking,
    "random": lambda *args, **own: search.random(*args, evaluations=12, seed=1, **own),
    "cross_entropy": lambda *args, **own: search.cross_entropy(
        *args, evaluations=12, population=5, seed=1, **own
    ),
    "greedy": lambda *args, **own: search.greedy(*args, evaluations=12, **own),
    "knapsack": search.knapsack,
    "measured knapsack": lambda *args, **own: search.knapsack(*args, evaluations=12, **own),
    "amc": lambda *args, **own: search.amc(
        *args, episodes=12, warmup=6, seed=1, settings=SMALL, **own
    ),
}
every_search = pytest.mark.parametrize("call", SEARCHES.values(), ids=SEARCHES)


class Killed(BaseException):
    """What a kill looks like from inside."""


def same(one, other):
    """Asserts that two results are equal, to the bit."""
    assert one.history == other.history
    assert (one.kept, one.score, one.cost) == (other.kept, other.score, other.cost)
    for path, kept in one.plan.kept.items():
        for own, their in zip(kept, other.plan.kept[path], strict=True):
            np.testing.assert_array_equal(own, their)


@every_search
def test_the_result_fits_the_budget_and_is_the_best_of_its_history(call):
    found = call(PROBLEM, OWN.evaluate)
    fitting = [own for own in found.history if own.cost <= PROBLEM.budget]
    assert found.score == max(own.score for own in fitting) == found.best[-1]
    assert found.cost == PROBLEM.account(tuple(found.kept.values())) <= PROBLEM.budget
    assert len(found.history) <= 12
    assert float(OWN.evaluate(found.plan.mask(OWN.variables))) == found.score
    assert f"score {found.score:.4g}" in str(found) and "a:1" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["kept"] == found.kept


@every_search
def test_one_program_serves_all_candidates(call):
    traces = []

    @jax.jit
    def evaluate(variables):
        traces.append(1)
        return OWN.evaluate(variables)

    call(PROBLEM, evaluate)
    assert len(traces) == 1


def test_masks_compile_once_for_many_episodes():
    compiled = []
    problem = PROBLEM._replace(masked=lambda *args: compiled.append(1) or PROBLEM.masked(*args))
    search.amc(problem, OWN.evaluate, episodes=60, warmup=20, settings=SMALL)
    assert len(compiled) == 1


@every_search
def test_the_same_call_gives_the_same_answer(call):
    same(call(PROBLEM, OWN.evaluate), call(PROBLEM, OWN.evaluate))


@pytest.mark.parametrize("name", ["random", "cross_entropy", "amc"])
def test_another_seed_gives_another_course(name):
    options = {"amc": {"episodes": 9, "settings": SMALL}}.get(name, {"evaluations": 9})
    call = getattr(search, name)
    one, two = (call(PROBLEM, OWN.evaluate, seed=seed, **options) for seed in (0, 1))
    assert one.history != two.history


@every_search
def test_a_killed_search_resumes_with_the_same_result(call, tmp_path):
    path = tmp_path / "journal.jsonl"
    whole = call(PROBLEM, OWN.evaluate, journal=tmp_path / "whole.jsonl")
    calls = itertools.count()

    def killed(variables):
        if next(calls) == 4:
            raise Killed
        return OWN.evaluate(variables)

    if len({own.counts for own in whole.history}) > 4:
        with pytest.raises(Killed):
            call(PROBLEM, killed, journal=path)
        with path.open("ab") as file:  # killed while it wrote a line
            file.write(b'{"counts": [8, ')
    evaluated = []

    def counting(variables):
        evaluated.append(1)
        return OWN.evaluate(variables)

    same(call(PROBLEM, counting, journal=path), whole)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    different = len({own.counts for own in whole.history})
    assert len(evaluated) == different - (4 if different > 4 else 0)
    same(call(PROBLEM, None, journal=path), whole)  # all of it is in the journal
    header, records = search.read_journal(path)
    assert header["decisions"] == {"a:1": 32, "b:1": 32, "c:1": 32}
    assert records == [(own.counts, own.score) for own in whole.history]


@pytest.mark.parametrize("name", ["random", "cross_entropy", "greedy", "amc"])
def test_candidates_together_are_those_one_by_one(name):
    call = SEARCHES[name]
    one, many = call(PROBLEM, OWN.evaluate), call(PROBLEM, OWN.evaluate, at_once=5)
    assert [own.counts for own in one.history] == [own.counts for own in many.history]
    np.testing.assert_allclose(
        [own.score for own in one.history], [own.score for own in many.history], rtol=1e-5
    )


def test_candidates_together_compile_once_and_resume(tmp_path):
    traces, path = [], tmp_path / "journal.jsonl"

    def evaluate(variables):
        traces.append(1)
        return OWN.evaluate(variables)

    whole = search.random(PROBLEM, evaluate, evaluations=11, at_once=4, journal=path)
    assert len(traces) == 1
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]))  # in the middle of the second part
    same(search.random(PROBLEM, evaluate, evaluations=11, at_once=4, journal=path), whole)


def test_variables_and_images_may_lie_on_a_mesh():
    mesh = sharding.make_mesh({"data": 8})
    images = jax.device_put(
        OWN.images, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    )
    variables = sharding.replicate(OWN.variables, mesh)
    dense = chain(variables, images)
    problem = search.channels(
        OWN.groups, variables, OWN.layers, cost=structure.count_parameters, budget=0.5
    )

    @jax.jit
    def evaluate(variables):
        return -jnp.mean((chain(variables, images) - dense) ** 2)

    for at_once in (1, 3):
        found = search.random(problem, evaluate, evaluations=6, seed=2, at_once=at_once)
        single = search.random(
            problem._replace(variables=OWN.variables), OWN.evaluate, evaluations=6, seed=2
        )
        assert found.kept == single.kept
        np.testing.assert_allclose(found.score, single.score, rtol=1e-4)


def test_a_module_is_its_own_variables():
    """A whole module of NNX, with a function among its attributes."""

    class Chain(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
            self.act = nnx.relu

        def __call__(self, x):
            return self.last(self.act(self.first(x)))

    module, x = Chain(nnx.Rngs(0)), jnp.ones((8, 4))
    groups = structure.find_groups(Chain.__call__, module, x)
    layers = search.find_layers(Chain.__call__, module, x[:1])
    cost = structure.count_parameters
    problem = search.channels(groups, module, layers, cost=cost, budget=0.6)
    dense = module(x)

    def evaluate(module):
        return -jnp.mean((module(x) - dense) ** 2)

    one = search.random(problem, nnx.jit(evaluate), evaluations=4)
    many = search.random(problem, evaluate, evaluations=4, at_once=2)
    assert one.kept == many.kept == {"first/kernel:1": 8}
    assert one.score == pytest.approx(many.score, rel=1e-5)


def test_progress_is_shown():
    seen = []
    search.random(
        PROBLEM,
        OWN.evaluate,
        evaluations=3,
        on_evaluation=lambda own, best: seen.append((own, best)),
    )
    assert len(seen) == 3 and seen[-1][1].reward == max(own.reward for own, _ in seen)


def test_a_search_of_weights_gives_masks():
    layers = search.find_layers(OWN.apply, OWN.variables, OWN.images[:1])
    problem = search.weights(OWN.variables, layers, budget=0.5, choices=9)
    found = search.ranking(problem, OWN.evaluate)
    kept = sum(int(own.sum()) for name, own in found.masks.items() if "bias" not in name)
    assert kept == found.cost <= problem.budget and found.plan is None
    assert found.masks["a_bias"].all()


# Rewards


def test_guaranteed_accuracy_prefers_small_networks_that_lose_nothing():
    def evaluate(variables):  # an accuracy: 1 while the free channels alone are removed
        return jnp.exp(OWN.evaluate(variables))

    problem = problem_of(OWN, 1.0)
    found = search.random(problem, evaluate, evaluations=30, seed=0)
    own = search.amc(
        problem, evaluate, episodes=30, seed=0, reward=search.guaranteed_accuracy, settings=SMALL
    )
    assert own.score == found.score == 1.0
    assert max(-(1 - x.score) * np.log(x.cost) for x in own.history) == 0
    assert own.history[0].reward == search.guaranteed_accuracy(*own.history[0][1:3])


# Bad input


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        (lambda v: float("nan"), "must return a finite number, but returned nan"),
        (lambda v: jnp.inf, "must return a finite number, but returned inf"),
        (lambda v: jnp.ones(3), r"returned an array of shape \(3,\)"),
        (lambda v: "good", "must return one number, but returned str"),
        (lambda v: None, "must return one number, but returned NoneType"),
    ],
)
def test_evaluate_must_return_one_finite_number(evaluate, message):
    with pytest.raises(ValueError, match=message):
        search.uniform(PROBLEM, evaluate)


def test_evaluate_must_return_one_number_for_each_of_several():
    with pytest.raises(ValueError, match="`evaluate` must return one number"):
        search.random(PROBLEM, lambda v: jnp.ones(3), evaluations=4, at_once=2)
    with pytest.raises(ValueError, match="finite number, but returned nan"):
        search.random(PROBLEM, lambda v: v["a"].sum() * jnp.nan, evaluations=4, at_once=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *own: search.amc(*own, episodes=0), "`episodes` must be an integer of at least 1"),
        (lambda *own: search.amc(*own, episodes=4, warmup=5), "`warmup` must be at most"),
        (lambda *own: search.random(*own, evaluations=0), "`evaluations` must be an integer"),
        (lambda *own: search.cross_entropy(*own, evaluations=True), "`evaluations` must be"),
        (lambda *own: search.cross_entropy(*own, elite=0), r"`elite` must be in \(0, 1\]"),
        (lambda *own: search.greedy(*own, evaluations=4), "at least 5 here, one for each"),
        (lambda *own: search.knapsack(*own, evaluations=5), "at least 10 here, or exactly 1"),
        (lambda *own: search.uniform(*own, at_once=0), "`at_once` must be an integer"),
    ],
)
def test_numbers_of_searches_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call(PROBLEM, OWN.evaluate)


def test_a_cost_that_changes_its_mind_is_refused():
    problem = PROBLEM._replace(account=lambda counts: PROBLEM.budget + 1)
    with pytest.raises(ValueError, match="`cost` must give the same number for the same plan"):
        search.uniform(problem, OWN.evaluate)


def test_a_search_that_finds_nothing_says_so():
    def dense(problem):
        yield [problem.sizes]

    with pytest.raises(ValueError, match="proposed no candidate that fits the budget"):
        search.run(PROBLEM, OWN.evaluate, dense(PROBLEM), name="dense")


def test_a_journal_of_a_different_search_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    search.random(PROBLEM, OWN.evaluate, evaluations=3, seed=0, journal=path)
    with pytest.raises(ValueError, match=r"holds a different search[\s\S]*'seed': 1"):
        search.random(PROBLEM, OWN.evaluate, evaluations=3, seed=1, journal=path)
    with pytest.raises(ValueError, match=r"budget: "):
        search.random(problem_of(OWN, 0.9), OWN.evaluate, evaluations=3, seed=0, journal=path)
    with pytest.raises(ValueError, match=r"search: 'random' there, 'uniform' now"):
        search.uniform(PROBLEM, OWN.evaluate, journal=path)


def test_a_damaged_journal_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    search.random(PROBLEM, OWN.evaluate, evaluations=3, seed=0, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1].replace(b"8", b"9", 1), *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 2 is damaged"):
        search.random(PROBLEM, OWN.evaluate, evaluations=3, seed=0, journal=path)


def test_a_journal_whose_candidates_differ_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    search.random(PROBLEM, OWN.evaluate, evaluations=3, seed=0, journal=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1]]))
    with pytest.raises(ValueError, match="must be of this search, but evaluation 0 is of"):
        search.random(PROBLEM, OWN.evaluate, evaluations=3, seed=0, journal=path)
