"""Specialisation: one sub-network for each budget, and a journal from which it resumes."""

import itertools
import json
import math

import numpy as np
import pytest

from jaxprune import elastic
from jaxprune.elastic import Decision, Evolution, Fit

SPACE = (
    Decision("stage", "depth", (0, 1)),
    Decision("a", "width", (2, 4, 8), "stage", 0),
    Decision("b", "width", (2, 4, 8)),
    Decision("c", "kernel", (3, 5)),
)
QUICK = {"predictor": Fit(hidden=(8,), steps=20), "evolution": Evolution(10, 5)}


def evaluate(choice):
    own = elastic.describe(SPACE, choice)
    return 0.5 + 0.01 * own.get("a", 0) + 0.02 * own["b"] + 0.001 * own["c"]


def cost(choice):
    own = elastic.describe(SPACE, choice)
    return own.get("a", 0) * own["b"] + own["b"] * own["c"]


def specialise(budgets=(10, 30, 104), own=evaluate, **options):
    return elastic.specialise(SPACE, own, cost, budgets, **(QUICK | {"measured": 12} | options))


def stopping_after(number):
    """An evaluation that is killed after some calls."""
    calls = []

    def own(choice):
        if len(calls) == number:
            raise KeyboardInterrupt
        calls.append(choice)
        return evaluate(choice)

    return own, calls


def test_points_fit_their_budgets_and_are_the_best_that_was_measured():
    front = specialise([104, 10, 30])
    assert [own.budget for own in front.points] == [10, 30, 104]
    for point in front.points:
        fitting = [own for own in front.measured if own.cost <= point.budget]
        assert point.score == max(own.score for own in fitting) == evaluate(point.choice)
        assert point.cost == cost(point.choice) <= point.budget
    assert front.points[-1].choice == elastic.largest(SPACE)
    # No sub-network twice, and both ends were measured.
    choices = [own.choice for own in front.measured]
    assert len(set(choices)) == len(choices)
    ends = [elastic.canonical(SPACE, own(SPACE)) for own in (elastic.largest, elastic.smallest)]
    assert choices[:2] == ends and front.sample == 12


def test_the_best_predictions_within_each_budget_are_measured():
    decisions = [Decision(name, "width", (1, 2, 3)) for name in "abcde"]
    effects = (5, 1, 4, 2, 3)
    front = elastic.specialise(
        decisions, lambda own: sum(e * i for e, i in zip(effects, own, strict=True)), sum, [3, 6],
        measured=30, verified=2, predictor=Fit(hidden=(16,), steps=300),
        evolution=Evolution(30, 15),
    )  # fmt: skip
    assert front.sample == 30 < len(front.measured) <= 34
    measured = {own.choice for own in front.measured}
    for budget in (3, 6):
        choices = [own for own in itertools.product(range(3), repeat=5) if sum(own) <= budget]
        order = np.argsort(-front.predictor(choices))
        assert {choices[i] for i in order[:2]} <= measured


def test_the_front_has_no_dominated_choice():
    front = specialise()
    pareto = front.pareto
    assert [own.cost for own in pareto] == sorted({own.cost for own in pareto})
    for own in front.measured:
        assert any(best.cost <= own.cost and best.score >= own.score for best in pareto)
    for own in pareto:
        assert not any(
            other.cost <= own.cost and other.score >= own.score and other != own for other in pareto
        )


def test_a_killed_call_resumes_without_measuring_twice(tmp_path):
    journal = tmp_path / "journal.jsonl"
    whole = specialise()
    own, first = stopping_after(7)
    with pytest.raises(KeyboardInterrupt):
        specialise(own=own, journal=journal)
    own, second = stopping_after(1000)
    resumed = specialise(own=own, journal=journal)
    assert resumed._replace(predictor=0, seconds=0, own_seconds=0) == whole._replace(
        predictor=0, seconds=0, own_seconds=0
    )
    assert not set(first) & set(second)
    assert len(first) + len(second) == len(whole.measured)
    own, third = stopping_after(0)  # other budgets measure only what is new
    fewer = specialise([30], own=own, journal=journal)
    assert third == [] and fewer.points[0].score == whole.points[1].score


def test_a_journal_of_another_space_or_evaluation_is_refused(tmp_path):
    journal = tmp_path / "journal.jsonl"
    specialise(journal=journal, settings={"network": "a"})
    with pytest.raises(ValueError, match="`journal` .* holds a different search"):
        specialise(journal=journal, settings={"network": "b"})
    other = (*SPACE[:3], Decision("c", "kernel", (3, 7)))
    with pytest.raises(ValueError, match="`journal` .* holds a different search"):
        elastic.specialise(
            other, lambda own: 0.5, sum, [9], journal=journal, settings={"network": "a"}, **QUICK
        )


def test_every_sub_network_of_a_small_space_is_drawn_once():
    found = elastic.draw_distinct(SPACE, 10**6, seed=0)
    assert len(set(found)) == len(found) == elastic.count(SPACE) == 24
    assert elastic.draw_distinct(SPACE, 9, seed=3) == elastic.draw_distinct(SPACE, 9, seed=3)


def test_results_are_reported():
    seen = []
    front = specialise(on_evaluation=lambda number, own: seen.append((number, own)))
    assert seen == [*enumerate(front.measured, 1)]
    text = str(front)
    assert "depth 1, width 8 8, kernel 5" in text and "Spearman" in text
    content = json.loads(json.dumps(front.to_dict()))
    assert content["points"][-1]["options"] == {"stage": 1, "a": 8, "b": 8, "c": 5}
    assert len(content["measured"]) == len(front.measured)


def test_nothing_is_measured_for_a_budget_that_no_choice_meets():
    own, calls = stopping_after(0)
    with pytest.raises(ValueError, match=r"`budgets` 1, 5 are met by no choice") as error:
        specialise([1, 5, 30], own=own)
    assert "costs 6: {'stage': 0, 'b': 2, 'c': 3}" in str(error.value) and not calls


def test_errors():
    with pytest.raises(ValueError, match=r"(?s)`measured` must be.*`verified` must be.*`budgets`"):
        specialise([], measured=4, verified=0)
    with pytest.raises(ValueError, match="`decisions` must allow at least 5 .* but allow 2"):
        elastic.specialise(SPACE[3:], evaluate, sum, [9])
    with pytest.raises(ValueError, match="`evaluate` must return a finite number"):
        specialise(own=lambda choice: math.nan)
    with pytest.raises(ValueError, match="`evaluate` must return one number, but returned str"):
        specialise(own=lambda choice: "good")
