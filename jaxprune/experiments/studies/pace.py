"""How many steps a run may take in a given time, from a short run with the same options.

A run has up to four parts: images are small or not, and channels are removed or not, or added, or
weights are removed where kernels skip them. In each part all steps cost the same; the rest is
start-up, compilation and switches, which longer runs pay once as well. `measure` reads both from a
short run, and `steps_within` answers.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxprune.experiments.config import Config
from jaxprune.experiments.pruning import window_of
from jaxprune.experiments.sources import image_sizes, step_after

# Whether images are small, and whether channels or weights are removed, or channels added.
Part = tuple[bool, bool]
Record = Mapping[str, Any]
CLOCKS = ("cpu_seconds", "seconds", "macs")  # of the process, of the wall, and of training


class Pace(NamedTuple):
    """What a run costs.

    Example:
        >>> pace = Pace({(False, False): 0.5}, 10.0, 28)
        >>> pace.each[False, False], pace.startup
        (0.5, 10.0)
    """

    each: Mapping[Part, float]  # of a step of each part
    startup: float  # what does not depend on the number of steps
    side: int  # height of the images of the data set, in pixels


def measure(config: Config, records: Sequence[Record], clock: str) -> Pace:
    """Reads what the steps of a finished run cost.

    Args:
        config: its configuration, with `steps`.
        records: of its metrics.jsonl; only those of training are used.
        clock: one of `CLOCKS`. "macs" counts the multiply-accumulates of the forward passes.

    Returns:
        A `Pace`: medians over the records of each part, without the first one, which compiles.

    Raises:
        ValueError: the run is too short for a part to be measured, or its last record is lost.

    Example:
        >>> config = Config(method="none", steps=30)
        >>> run = [{"step": s, "train_loss": 1.0, "cpu_seconds": 5 + s / 2} for s in (10, 20, 30)]
        >>> measure(config, run, "cpu_seconds")
        Pace(each={(False, False): 0.5}, startup=5.0, side=0)
    """
    records = [record for record in records if "train_loss" in record]
    if not records or records[-1]["step"] != config.steps:
        raise ValueError(
            f"metrics.jsonl of the short run has no record of its last step, {config.steps}; "
            "delete its folder, and the same command trains it again"
        )
    sides = [record.get("image_height", 0) for record in records]
    full = max(sides)
    # Kernels skip what is masked; without them only smaller arrays are cheaper.
    extent = "parameters" if config.kernels == "off" else "sparsity"
    first, last = records[0].get(extent), records[-1].get(extent)
    seen: dict[Part, list[float]] = {}
    for before, now in zip(records, records[1:], strict=False):
        kind = now.get("image_height", 0), now.get(extent)
        if kind != (before.get("image_height", 0), before.get(extent)):
            continue  # a switch lies between them
        if extent == "parameters" and kind[1] not in (first, last):
            continue  # between two switches
        # Kernels grow cheaper with each mask update; what lies before the last one is one part.
        changed = kind[1] == last != first if extent == "sparsity" else kind[1] != first
        part = kind[0] < full, changed
        steps = now["step"] - before["step"]
        if clock == "macs":
            area = (kind[0] / full) ** 2 if full else 1.0
            seen.setdefault(part, []).append(now["macs"] * area * config.batch_size)
        else:
            seen.setdefault(part, []).append((now[clock] - before[clock]) / steps)
    each = {part: statistics.median(costs) for part, costs in seen.items()}
    pace = Pace(each, 0.0, full)
    own = cost(pace, config, config.steps)
    return pace if clock == "macs" else pace._replace(startup=max(0.0, records[-1][clock] - own))


def lengths(config: Config, steps: int, side: int) -> dict[Part, int]:
    """Returns how many steps a run of a length spends in each part; those of no steps are absent.

    Channels and weights count as removed after the last mask update, even if some go earlier. A
    network that grows counts as small until the switch, even if another one delays it.

    Args:
        config: the options of the run.
        steps: its length.
        side: height of the images of the data set; 0: they do not grow.

    Example:
        >>> config = Config(method="none", small_images=0.5, small_until=0.25)
        >>> lengths(config, 100, 28)
        {(True, False): 36, (False, False): 64}
    """
    changed = steps
    if config.compact or config.kernels != "off":
        delay = config.switch_delay if config.compact else 0
        changed = min(steps, window_of(config, steps).updates[-1] + 1 + delay)
    elif config.grow_from < 1:
        changed = min(steps, step_after(steps, config.grow_at) + config.switch_delay)
    sizes = image_sizes(config, (side, side), steps) if side else {0: (0, 0)}
    grown = min(steps, max(sizes) + config.switch_delay) if len(sizes) > 1 else 0
    ends = sorted({changed, grown, steps})
    found: dict[Part, int] = {}
    for start, stop in zip([0, *ends], ends, strict=False):
        if stop > start:
            found[start < grown, start >= changed] = stop - start
    return found


def cost(pace: Pace, config: Config, steps: int) -> float:
    """Returns what a run of a length costs, in the unit of its pace.

    Raises:
        ValueError: a part of it was not measured.

    Example:
        >>> cost(Pace({(False, False): 0.5}, 10.0, 0), Config(method="none"), 100)
        60.0
    """
    own = lengths(config, steps, pace.side)
    if missing := [part for part in own if part not in pace.each]:
        event = "growth" if config.grow_from < 1 else "removal"
        words = " and ".join(
            f"{'small' if small else 'whole'} images {'after' if changed else 'before'} the {event}"
            for small, changed in missing
        )
        raise ValueError(
            f"the short run has no two records in a row of the part with {words}; give it more "
            "steps with --probe-steps"
        )
    return pace.startup + sum(pace.each[part] * count for part, count in own.items())


def steps_within(pace: Pace, config: Config, budget: float) -> int:
    """Returns the most steps that cost at most `budget`.

    Args:
        pace: of the same options, from `measure`.
        config: the options; the schedule stretches with the number of steps.
        budget: in the unit of the pace.

    Raises:
        ValueError: no step fits.

    Example:
        >>> steps_within(Pace({(False, False): 0.5}, 10.0, 0), Config(method="none"), 60.9)
        101
    """
    if (least := cost(pace, config, 1)) > budget:
        raise ValueError(
            f"a run of one step costs {least:.3g}, most of it start-up and compilation, and "
            f"{budget:.3g} is allowed: give the dense network more steps, or the others more --time"
        )
    low, high = 1, 2
    while cost(pace, config, high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(pace, config, middle) <= budget else (low, middle)
    return low


def work(records: Sequence[Record]) -> float | None:
    """Returns the MACs of the forward passes of a run, per image of a batch; None if not logged.

    Example:
        >>> run = [{"step": 10, "train_loss": 1.0, "macs": 8.0, "image_height": 14}]
        >>> work([*run, {"step": 20, "train_loss": 1.0, "macs": 4.0, "image_height": 28}])
        60.0
    """
    records = [record for record in records if "train_loss" in record]
    if not records or any("macs" not in record for record in records):
        return None
    full = max(record.get("image_height", 1) for record in records)
    total, before = 0.0, 0
    for record in records:
        area = (record.get("image_height", full) / full) ** 2
        total += (record["step"] - before) * record["macs"] * area
        before = record["step"]
    return total


def config_of(saved: Mapping[str, Any]) -> Config:
    """Returns the configuration that config.json of a run holds."""
    names = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in saved.items() if name in names})
