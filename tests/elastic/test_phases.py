"""Phases of progressive shrinking, and what each step draws."""

import numpy as np
import pytest

from jaxprune import elastic
from jaxprune.elastic import Decision, Phase

SPACE = (
    Decision("stage", "depth", (0, 1, 2)),
    Decision("b0", "width", (2, 4, 6), "stage", 0),
    Decision("b0/window", "kernel", (3, 5, 7), "stage", 0),
)


def test_phases_are_the_published_ones():
    own = elastic.phases(SPACE, 5900, learning_rate=2.6 / 32)
    assert [phase.name for phase in own] == [
        "full",
        "kernel",
        "depth 1",
        "depth 2",
        "width 1",
        "width 2",
    ]
    assert [phase.steps for phase in own] == [1800, 1200, 250, 1200, 250, 1200]
    assert [phase.networks for phase in own] == [1, 1, 2, 2, 4, 4]
    rates = [phase.learning_rate for phase in own]
    np.testing.assert_allclose(rates, [2.6 / 32, 3e-2, 2.5e-3, 7.5e-3, 2.5e-3, 7.5e-3])
    assert [phase.warmup for phase in own] == [0, 50, 0, 50, 0, 50]
    assert [phase.sort for phase in own] == [False] * 4 + [True] * 2
    assert [phase.teaches for phase in own] == [False] + [True] * 5


def test_phases_that_open_nothing_are_left_out():
    widths = (Decision("b0", "width", (2, 4)),)
    own = elastic.phases(widths, 300)
    assert [(phase.name, phase.steps) for phase in own] == [("full", 180), ("width 1", 120)]
    assert own[1].learning_rate > 0.09 * own[0].learning_rate  # of the longer phase


@pytest.mark.parametrize("steps", [6, 7, 11, 50, 999])
@pytest.mark.parametrize("sandwich", [False, True])
def test_phases_have_all_steps(steps, sandwich):
    own = elastic.phases(SPACE, steps, sandwich=sandwich)
    assert sum(phase.steps for phase in own) == steps
    assert min(phase.steps for phase in own) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 5}, "`steps` must be at least 6"),
        ({"steps": 50, "networks": 0}, "`networks` must be at least 1"),
        ({"steps": 50, "networks": 1, "sandwich": True}, "`networks` must be at least 2"),
        ({"steps": 50, "learning_rate": 0.0}, "`learning_rate` above 0"),
    ],
)
def test_phases_check_their_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        elastic.phases(SPACE, **options)


def test_the_rate_rises_and_falls():
    phase = Phase("p", 10, 1, 0.5, {}, warmup=2)
    rates = [phase.rate(step) for step in range(10)]
    assert rates[0] == 0.25
    assert rates[1] == rates[2] == 0.5
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05


def draws(phase, steps=200):
    return [own for step in range(steps) for own in elastic.sub_networks(SPACE, phase, 0, step)]


def test_each_phase_draws_the_options_that_it_opens_and_no_others():
    expected = {
        "full": [{2}, {2}, {2}],
        "kernel": [{2}, {2}, {0, 1, 2}],
        "depth 1": [{1, 2}, {2}, {0, 1, 2}],
        "depth 2": [{0, 1, 2}, {2}, {0, 1, 2}],
        "width 1": [{0, 1, 2}, {1, 2}, {0, 1, 2}],
        "width 2": [{0, 1, 2}, {0, 1, 2}, {0, 1, 2}],
    }
    for phase in elastic.phases(SPACE, 600):
        drawn = draws(phase)
        assert [set(own) for own in zip(*drawn, strict=True)] == expected[phase.name]


def test_draws_depend_on_seed_step_and_number_alone():
    """So all processes draw the same, and a run that resumes draws what it would have drawn."""
    phase = elastic.phases(SPACE, 600)[-1]
    one = [elastic.sub_networks(SPACE, phase, 3, step) for step in range(50)]
    again = [elastic.sub_networks(SPACE, phase, 3, step) for step in reversed(range(50))]
    assert one == again[::-1]
    assert one != [elastic.sub_networks(SPACE, phase, 4, step) for step in range(50)]
    assert len(set(one[0])) > 1
    fewer = phase._replace(networks=2)
    assert elastic.sub_networks(SPACE, fewer, 3, 7) == one[7][:2]


def test_the_sandwich_has_the_largest_and_the_smallest():
    full, sandwich = elastic.phases(SPACE, 600, networks=3, sandwich=True)
    assert (full.name, full.networks, sandwich.networks) == ("full", 1, 3)
    steps = [elastic.sub_networks(SPACE, sandwich, 0, step) for step in range(30)]
    assert {own[0] for own in steps} == {(2, 2, 2)}
    assert {own[1] for own in steps} == {(0, 0, 0)}
    assert len({own[2] for own in steps}) > 10


def test_resolutions_vary_from_the_start_also_at_the_ends_of_a_sandwich():
    space = (*SPACE, Decision("resolution", "resolution", (6, 8)))
    full, sandwich = elastic.phases(space, 600, sandwich=True)
    for phase in (full, sandwich):
        steps = [elastic.sub_networks(space, phase, 0, step) for step in range(30)]
        assert {own[0][-1] for own in steps} == {0, 1}
