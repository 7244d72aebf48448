"""Summarizes times that were measured in turns."""

from collections.abc import Mapping, Sequence

import numpy as np


def summary(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Returns minimum, quartile and median of each network, and its speed-up over the first.

    Other programs only ever add time, so the minimum is the least disturbed.

    Args:
        times: name -> milliseconds, measured in turns; the first is compared with.

    Returns:
        Name -> `min`, `q25` and `median` in milliseconds, and `speedup` and `speedup_q25` of the
            first two.

    Raises:
        ValueError: if there are no times, or some are not positive.

    Example:
        >>> summary({"dense": [4.0, 5.0], "sparse": [3.0, 2.0]})["sparse"]["speedup"]
        2.0
    """
    bad = [name for name, own in times.items() if not len(own) or not min(own) > 0]
    if bad or not times:
        raise ValueError(f"`times` must be positive milliseconds of networks; not so: {bad}")
    rows = {}
    for name, own in times.items():
        low, quarter, half = np.quantile(np.asarray(own, float), (0, 0.25, 0.5)).tolist()
        rows[name] = {"min": low, "q25": quarter, "median": half}
    first = next(iter(rows.values()))
    for row in rows.values():
        row["speedup"] = first["min"] / row["min"]
        row["speedup_q25"] = first["q25"] / row["q25"]
    return rows
