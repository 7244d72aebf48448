"""All phases as one call: what is trained, that it resumes to the bit, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import elastic, sharding
from jaxprune.elastic import Recipe, _training
from tests.support import elastic as support

RECIPE = Recipe(batch_size=16, learning_rate=0.3, pad=0, flip=False, weight_decay=0.0)
STEPS = 18
pytestmark = pytest.mark.slow


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def train(space=None, **options):
    options = {"steps": STEPS, "recipe": RECIPE, "networks": 2, "mesh": one_device()} | options
    return elastic.train(
        support.make_space() if space is None else space, support.images(), **options
    )


def assert_equal(one, other):
    for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def whole():
    """A training without any stop."""
    return train()


def test_all_phases_are_trained(whole):
    planned = elastic.phases(whole.space.decisions, STEPS, networks=2)
    assert [own.name for own in whole.results] == [own.name for own in planned]
    assert [own.name for own in planned][-2:] == ["width 1", "width 2"]
    for own, phase in zip(whole.results, planned, strict=True):
        assert (own.steps, own.passes) == (phase.steps, phase.steps * phase.networks)


def test_small_networks_learn_and_the_full_one_stays_good():
    decisions = support.make_space().decisions
    full, *_, last = elastic.phases(decisions, 100, learning_rate=0.3)
    last = last._replace(steps=60, learning_rate=0.1)
    first, second = train(steps=0, phases=[full._replace(steps=40), last]).results
    assert first.full_accuracy > 0.9
    assert second.full_accuracy > 0.9
    assert second.smallest_accuracy > 0.6 > 0.1 + first.smallest_accuracy


def test_a_step_is_compiled_once_for_all_sub_networks_and_phases():
    """The trained function is traced for training, for the teacher, and to measure statistics."""
    traced = []

    def counted(variables, x):
        traced.append(x.shape)
        return support.train(variables, x)

    train(support.make_space(train=counted), steps=18)
    few = len(traced)
    traced.clear()
    train(support.make_space(train=counted), steps=36, networks=4)
    assert len(traced) == few


class Killed(Exception):
    """What a kill looks like from inside."""


def killed_at(step):
    def on_log(now, metrics):
        if now == step:
            raise Killed

    return {"on_log": on_log, "log_every": 1}


@pytest.mark.parametrize("step", [2, 5, 6, 7, 13, 17])
def test_a_killed_run_resumes_to_the_bit(tmp_path, whole, step):
    """Inside of phases, at their ends, before and after the teacher is frozen."""
    options = {"workdir": tmp_path, "save_every": 3}
    with pytest.raises(Killed):
        train(**options, **killed_at(step))
    resumed = train(**options)
    assert_equal(resumed.variables, whole.variables)
    assert resumed.results == whole.results


def test_a_run_that_is_stopped_again_and_again_resumes_to_the_bit(tmp_path, whole):
    for _ in range(STEPS):
        try:
            found = train(workdir=tmp_path, should_stop=lambda: True)
        except elastic.Stopped:
            continue
        break
    assert_equal(found.variables, whole.variables)
    assert found.results == whole.results


def test_a_finished_run_is_read(tmp_path, whole):
    train(workdir=tmp_path)
    logged = []
    again = train(workdir=tmp_path, on_log=lambda *own: logged.append(own))
    assert_equal(again.variables, whole.variables)
    assert not logged


def test_the_teacher_is_never_changed(monkeypatch, whole):
    """It is the network at the end of the first phase, in all later steps."""
    seen, make = [], _training.make_programs

    def spied(*args):
        programs = make(*args)

        def teach(params, *rest):
            seen.append(np.asarray(params["params"]["head"]))
            return programs.teach(params, *rest)

        return programs._replace(teach=teach)

    phases = elastic.phases(whole.space.decisions, STEPS, networks=1)
    first = train(steps=0, phases=phases[:1]).variables["params"]["head"]
    monkeypatch.setattr(_training, "make_programs", spied)
    last = train(steps=0, phases=phases).variables["params"]["head"]
    assert len(seen) == STEPS - phases[0].steps
    for head in seen:
        np.testing.assert_array_equal(head, first)
    assert not np.array_equal(last, first)


def test_several_devices_train_the_same(whole):
    """Sums over devices differ in their order alone."""
    found = train(mesh=sharding.make_mesh())
    for one, other in zip(
        jax.tree.leaves(found.variables), jax.tree.leaves(whole.variables), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0.05, atol=2e-3)


def test_channels_are_sorted_before_widths_vary():
    """The function stays as it was, but the channels of the teacher have moved."""
    space = support.make_space()
    phases = elastic.phases(space.decisions, STEPS, networks=1)
    before = [own for own in phases if not own.sort]
    sort = phases[len(before)]._replace(steps=1, learning_rate=0.0)
    one = train(space, steps=0, phases=before)
    other = train(space, steps=0, phases=[*before, sort])
    first, second = (own.variables["params"]["block0"]["up"]["kernel"] for own in (one, other))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.sort(first, axis=None), np.sort(second, axis=None))
    assert one.results[-1].full_accuracy == other.results[-1].full_accuracy


def test_statistics_are_those_of_the_full_network(whole):
    variables = whole.variables
    moments = variables["state"]["stem"]
    assert (moments["var"] > 0).all()
    smallest = elastic.smallest(whole.space.decisions)
    assert whole.space.gates(smallest)["body"].sum() == 0
    assert bool(jnp.isfinite(moments["mean"]).all())


def test_resolutions_are_a_program_each():
    shapes = []

    def counted(variables, x):
        shapes.append(x.shape[1])
        return support.train(variables, x)

    space = support.make_space(train=counted, resolutions=(4, 6), kernels=False)
    trained = train(space, steps=0, phases=elastic.phases(space.decisions, 16, networks=2))
    assert set(shapes) == {4, 6}
    once = len(shapes)
    shapes.clear()
    train(space, steps=0, phases=elastic.phases(space.decisions, 32, networks=2))
    assert len(shapes) == once
    smallest = elastic.smallest(space.decisions)
    assert elastic.extract(space, trained.variables, smallest).resolution == 4


def test_the_sandwich_trains(tmp_path):
    found = train(sandwich=True)
    assert [own.name for own in found.results] == ["full", "sandwich"]


def test_a_run_of_another_space_is_refused(tmp_path):
    train(workdir=tmp_path, steps=6)
    with pytest.raises(ValueError, match=r"different space(.|\n)*deep/kernel: \['kernel', \[3, 5"):
        train(support.make_space(kernels=False), workdir=tmp_path, steps=6)


def test_a_run_with_other_options_is_refused(tmp_path):
    train(workdir=tmp_path, steps=6)
    with pytest.raises(ValueError, match="different configuration(.|\n)*seed: 0 there, 1 now"):
        train(workdir=tmp_path, steps=6, seed=1)


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(ValueError, match="not finite in phase full"):
        train(recipe=RECIPE._replace(learning_rate=1e30), log_every=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "give either `steps` or `phases`"),
        ({"save_every": 0}, "must be positive"),
        ({"recipe": RECIPE._replace(batch_size=15), "mesh": None}, "`batch_size` must divide"),
    ],
)
def test_arguments_are_checked(options, says):
    with pytest.raises(ValueError, match=says):
        train(**options)


def test_a_space_without_training_is_refused():
    space = support.make_space()._replace(train=None, variables=[1])
    with pytest.raises(ValueError, match='no `train` function(.|\n)*with "params"'):
        train(space)
