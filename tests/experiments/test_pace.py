"""How many steps fit into a time: parts of a run, medians, start-up, and the longest that fits."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxprune.experiments.config import Config
from jaxprune.experiments.studies import pace

CHANNELS = Config(
    method="agip", granularity="channels", compact=True, prune_start=0.03, prune_stop=0.1,
    prune_every=20, small_images=0.5, small_until=0.5, steps=400,
)  # fmt: skip
GROWS = dataclasses.replace(
    CHANNELS, method="none", compact=False, grow_from=0.5, grow_at=0.1, small_until=0.5
)
EACH = {(True, False): 4.0, (True, True): 1.0, (False, False): 16.0, (False, True): 3.0}


def run(config, side=28, startup=50.0, each=EACH, every=5):
    """Records of a run that costs exactly this."""
    own, records, now = pace.lengths(config, config.steps, side), [], startup
    kinds = [part for part, count in own.items() for _ in range(count)]
    for step, (small, removed) in enumerate(kinds, start=1):
        now += each[small, removed]
        if step % every == 0:
            values = {"cpu_seconds": now, "train_loss": 1.0, "macs": 8.0 if removed else 32.0}
            values |= {"image_height": side // 2 if small else side}
            few = removed == (config.grow_from == 1)
            records.append({"step": step, "parameters": 25 if few else 100} | values)
    return records


def test_parts_of_a_run():
    # Masks change from step 12 to 40, so channels go at 51; images grow at 201, 10 steps later.
    found = pace.lengths(CHANNELS, 400, 28)
    assert found == {(True, False): 51, (True, True): 160, (False, True): 189}
    masks = dataclasses.replace(CHANNELS, compact=False)
    assert pace.lengths(masks, 400, 28) == {(True, False): 211, (False, False): 189}
    assert pace.lengths(CHANNELS, 400, 0) == {(False, False): 51, (False, True): 349}


def test_parts_of_a_run_that_grows():
    # It grows after step 41, and images after 201, each 10 steps later.
    expected = {(True, False): 51, (True, True): 160, (False, True): 189}
    assert pace.lengths(GROWS, 400, 28) == expected
    late = dataclasses.replace(GROWS, grow_at=0.75)
    assert pace.lengths(late, 400, 28) == {
        (True, False): 211, (False, False): 100, (False, True): 89,
    }  # fmt: skip
    assert pace.lengths(GROWS, 20, 0) == {(False, False): 13, (False, True): 7}
    assert pace.lengths(dataclasses.replace(GROWS, grow_from=1.0), 40, 0) == {(False, False): 40}


@pytest.mark.parametrize("config", [CHANNELS, GROWS], ids=["shrinks", "grows"])
def test_a_short_run_tells_what_a_long_one_costs(config):
    found = pace.measure(config, run(config), "cpu_seconds")
    assert dict(found.each) == {part: EACH[part] for part in pace.lengths(config, 400, 28)}
    assert found.startup == pytest.approx(50.0)
    longer = dataclasses.replace(config, steps=4000)
    assert pace.cost(found, config, 4000) == pytest.approx(run(longer)[-1]["cpu_seconds"])


def test_steps_of_kernels_are_those_between_mask_updates():
    # Updates at 5, 13 and 21 make the steps cheaper; the last one is as sparse as the run ends.
    config = Config(
        method="agip", kernels="auto", prune_start=0.05, prune_stop=0.25, prune_every=8, steps=100
    )
    records, now = [], 20.0
    for step in range(1, 101):
        updates = sum(step > update for update in (5, 13, 21))
        now += (8.0, 4.0, 3.0, 1.0)[sum(step - 1 > update for update in (5, 13, 21))]
        record = {"step": step, "cpu_seconds": now, "train_loss": 1.0, "parameters": 100}
        records.append(record | {"sparsity": (0.0, 0.5, 0.7, 0.8)[updates]})
    found = pace.measure(config, records, "cpu_seconds")
    # Before the last update: 4 times 8 (the first record has none before it), 7 times 4 and 3.
    assert found.each == {(False, False): 4.0, (False, True): 1.0}
    assert pace.lengths(config, 1000, 0) == {(False, False): 251, (False, True): 749}


def test_one_slow_record_changes_nothing():
    records = run(CHANNELS)
    for record in records[60:]:
        record["cpu_seconds"] += 30.0  # as a garbage collection or another program would
    found = pace.measure(CHANNELS, records, "cpu_seconds")
    assert found.each[False, True] == 3.0 and found.startup == pytest.approx(80.0)


def test_macs_count_the_size_of_images_and_batches():
    found = pace.measure(CHANNELS, run(CHANNELS), "macs")
    batch = CHANNELS.batch_size
    assert found.startup == 0
    assert dict(found.each) == {
        (True, False): 32 / 4 * batch, (True, True): 8 / 4 * batch, (False, True): 8 * batch,
    }  # fmt: skip


def test_a_teacher_is_part_of_what_was_measured():
    """It costs from the first cut on, in each clock: nothing is added to what the records say."""
    taught = dataclasses.replace(CHANNELS, teacher=0.5)
    each = EACH | {(True, True): 1.0 + 4.0 / 3, (False, True): 3.0 + 16.0 / 3}
    found = pace.measure(taught, run(taught, each=each), "cpu_seconds")
    assert pace.lengths(taught, 400, 28) == pace.lengths(CHANNELS, 400, 28)
    assert dict(found.each) == pytest.approx(
        {part: each[part] for part in pace.lengths(taught, 400, 28)}
    )
    longer = dataclasses.replace(taught, steps=4000)
    assert pace.cost(found, taught, 4000) == pytest.approx(
        run(longer, each=each)[-1]["cpu_seconds"]
    )
    records = [
        own | {"macs": own["macs"] + 32 / 3 * (own["parameters"] == 25)} for own in run(taught)
    ]
    # By records of 5 steps: 50 to 210 on small images, 210 to 400 on whole ones.
    more = 32 / 3 * (160 / 4 + 190)
    assert pace.work(records) - pace.work(run(taught)) == pytest.approx(more)
    by_work = pace.measure(taught, records, "macs").each
    assert by_work[False, True] == pytest.approx((8 + 32 / 3) * taught.batch_size)


@hypothesis.given(
    budget=st.floats(60, 1e5),
    compact=st.booleans(),
    until=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_the_most_steps_that_fit(budget, compact, until):
    config = dataclasses.replace(CHANNELS, compact=compact, small_until=until)
    own = pace.Pace(EACH, 50.0, 28)
    hypothesis.assume(pace.cost(own, config, 1) <= budget)
    steps = pace.steps_within(own, config, budget)
    assert pace.cost(own, config, steps) <= budget
    assert sum(pace.lengths(config, steps, 28).values()) == steps
    # Costs jump where a schedule rounds, so a little longer run may fit; a twice as long one not.
    assert pace.cost(own, config, 2 * steps + 40) > budget


def test_a_part_that_was_not_measured_is_named():
    short = dataclasses.replace(CHANNELS, steps=20)
    with pytest.raises(ValueError, match="small images before the removal.*--probe-steps"):
        pace.measure(short, run(short, every=10), "cpu_seconds")
    short = dataclasses.replace(GROWS, steps=20)
    with pytest.raises(ValueError, match="small images before the growth.*--probe-steps"):
        pace.measure(short, run(short, every=10), "cpu_seconds")
    with pytest.raises(ValueError, match="no record of its last step, 400"):
        pace.measure(CHANNELS, run(CHANNELS)[:-1], "cpu_seconds")
    with pytest.raises(ValueError, match="a run of one step costs 54"):
        pace.steps_within(pace.Pace(EACH, 50.0, 28), CHANNELS, 53.0)
