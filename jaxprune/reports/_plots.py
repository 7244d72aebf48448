"""Plots of training and of densities, on figures outside pyplot's global state."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxprune import files, trees
from jaxprune.masks import overlap
from jaxprune.reports._summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow: readers with any colour vision can tell them apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_COSTS = {"seconds": "Training time", "parameters": "Parameters"}
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def plot_training(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]
) -> None:
    """Draws accuracy and sparsity over steps, one line per run.

    Args:
        histories: label of a run -> its records, as in `metrics.jsonl`: `step`, and if measured
            `test_accuracy`, `train_accuracy` and `sparsity`, all fractions from 0 to 1.
        path: the PNG file to write, atomically. Its folder is created.

    Raises:
        ValueError: if no record of any run has an accuracy.

    Example:
        >>> import pathlib, tempfile
        >>> runs = {"dense": [{"step": 0, "test_accuracy": 0.1}, {"step": 9, "test_accuracy": 0.9}]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_training(runs, f"{folder}/training.png")
        ...     pathlib.Path(folder, "training.png").read_bytes()[1:4]
        b'PNG'
    """
    names = {"test_accuracy": "test", "train_accuracy": "training batch"}
    shown = [key for key in names if any(_points(run, key)[0] for run in histories.values())]
    if not shown:
        raise ValueError(
            "`histories` must hold a `test_accuracy` or `train_accuracy` beside `step`, but no "
            f"record of the runs {list(histories)} has one: pass the lines of metrics.jsonl"
        )
    figure = _figure(7.0, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for index, (label, records) in enumerate(histories.items()):
        style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)]}
        dashes = _DASHES[index % len(_DASHES)]
        for key in reversed(shown):
            steps, values = _points(records, key)
            main = key == shown[0]
            if not steps:
                continue
            top.plot(
                steps,
                values,
                linestyle=dashes if main else "-",
                linewidth=1.8 if main else 0.8,
                alpha=1.0 if main else 0.3,
                marker="o" if main and len(steps) <= 40 else "",
                markersize=3.5,
                label=f"{label}: {values[-1]:.1%} {names[key]}" if main else None,
                **style,
            )
        steps, values = _points(records, "sparsity")
        if steps:
            bottom.plot(
                steps, values, linestyle=dashes, label=f"{label}: {values[-1]:.1%}", **style
            )
    faint = " (faint: training batches)" if len(shown) > 1 else ""
    _finish(top, ylabel=f"{names[shown[0]].capitalize()} accuracy", title="Accuracy" + faint)
    _finish(bottom, ylabel="Weights that are zero", title="Sparsity", xlabel="Step")
    top.set_ylim(_lower_limit(histories, shown), 1.005)
    bottom.set_ylim(-0.03, 1.03)
    _save(figure, path)


def plot_densities(
    summaries: Summary | Mapping[str, Summary], path: str | os.PathLike[str]
) -> None:
    """Draws the density of each layer as a bar, with its number of parameters.

    Leaves of fewer than two dimensions (biases, norm parameters) are shown only if there are no
    others, as they are not pruned by default.

    Args:
        summaries: one `Summary`, or label -> `Summary` of networks to compare.
        path: the PNG file to write, atomically. Its folder is created.

    Raises:
        ValueError: if `summaries` is empty.

    Example:
        >>> import pathlib, tempfile, numpy as np
        >>> from jaxprune.reports import summarize
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_densities(summarize({"kernel": np.eye(4)}), f"{folder}/densities.png")
        ...     pathlib.Path(folder, "densities.png").read_bytes()[1:4]
        b'PNG'
    """
    runs = {"": summaries} if isinstance(summaries, Summary) else dict(summaries)
    if not runs:
        raise ValueError("`summaries` must hold at least one summary, but is empty.")
    sizes: dict[str, int] = {}
    for summary in runs.values():
        kernels = [row for row in summary.rows if len(row.shape) >= 2] or summary.rows
        sizes |= {row.path: row.parameters for row in kernels}
    layers = list(sizes)
    height = 0.8 / len(runs)
    figure = _figure(7.5, 1.3 + len(layers) * max(0.24, 0.15 * len(runs)))
    axes = figure.subplots()
    for index, (label, summary) in enumerate(runs.items()):
        density = {row.path: row.density for row in summary.rows}
        bars = axes.barh(
            np.arange(len(layers)) + (index - (len(runs) - 1) / 2) * height,
            [density.get(layer, 0.0) for layer in layers],
            height=0.92 * height,
            color=_COLOURS[index % len(_COLOURS)],
            label=f"{label}: {summary.total.density:.1%} in all" if label else None,
        )
        texts = [f"{density[layer]:.1%}" if layer in density else "" for layer in layers]
        axes.bar_label(bars, texts, padding=3, fontsize=7, color="#333333")
    axes.set_yticks(
        np.arange(len(layers)), [f"{layer}  ({sizes[layer]:,})" for layer in layers], fontsize=8
    )
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, 1.1)
    axes.set_xticks(np.linspace(0, 1, 6))
    total = "" if len(runs) > 1 else f": {next(iter(runs.values())).total.density:.1%} in all"
    _finish(axes, title=f"Weights kept in each layer{total}", xlabel="Density", percent="x")
    axes.grid(visible=False, axis="y")
    _save(figure, path)


def plot_accuracy(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws accuracy against sparsity, one line per method and dense runs as a band.

    Args:
        rows: one row for each method and sparsity: `method` ("none" is dense), `sparsity` and
            `accuracy` as fractions, `SD` the standard deviation of the accuracy, or None.
        path: the PNG file to write, atomically. Its folder is created.

    Raises:
        ValueError: if `rows` is empty.

    Example:
        >>> import pathlib, tempfile
        >>> rows = [{"method": "none", "sparsity": 0.0, "accuracy": 0.9, "SD": 0.01},
        ...         {"method": "agip", "sparsity": 0.8, "accuracy": 0.9, "SD": None}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_accuracy(rows, f"{folder}/accuracy.png")
        ...     pathlib.Path(folder, "accuracy.png").read_bytes()[1:4]
        b'PNG'
    """
    if not rows:
        raise ValueError("`rows` must have one row for each method and sparsity, but is empty.")
    figure = _figure(7.0, 4.8)
    axes = figure.subplots()
    # Equal distances on the axis are equal factors of the kept weights.
    _draw_methods(axes, rows, lambda row: -math.log(1 - row["sparsity"]), shift=0.015)
    ticks = sorted({row["sparsity"] for row in rows if row["method"] != "none"})
    axes.set_xticks([-math.log(1 - s) for s in ticks], [f"{s:.4g}" for s in ticks])
    title = "Test accuracy: mean and SD over seeds"
    _finish(axes, title=title, xlabel="Sparsity", ylabel="Accuracy")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    _save(figure, path)


def plot_retraining(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws accuracy against compression and against training cost, side by side.

    Args:
        rows: one row for each method and round: `method` ("none" is the dense network), `density`
            of the pruned leaves, `accuracy` as a fraction, `SD` its standard deviation, or None,
            and `epochs` of all training up to that round. Methods that prune nothing are in the
            right panel only.
        path: the PNG file to write, atomically. Its folder is created.

    Raises:
        ValueError: if `rows` is empty.

    Example:
        >>> import pathlib, tempfile
        >>> row = {"method": "none", "density": 1.0, "accuracy": 0.9, "SD": 0.01, "epochs": 2.0}
        >>> pruned = row | {"method": "fine_tune", "density": 0.2, "epochs": 10.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_retraining([row, pruned], f"{folder}/accuracy.png")
        ...     pathlib.Path(folder, "accuracy.png").read_bytes()[1:4]
        b'PNG'
    """
    if not rows:
        raise ValueError("`rows` must have one row for each method and round, but is empty.")
    figure = _figure(11.0, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    pruned = [row for row in rows if row["density"] < 1 or row["method"] == "none"]
    _draw_methods(left, pruned, lambda row: -math.log(row["density"]), shift=0.012, of=rows)
    _draw_methods(right, rows, lambda row: row["epochs"], shift=0.0)
    ticks = sorted({row["density"] for row in pruned if row["method"] != "none"})
    left.set_xticks([-math.log(d) for d in ticks], [f"{1 / d:.3g}" for d in ticks])
    title = "Test accuracy: mean and SD over seeds"
    _finish(left, title=title, xlabel="Compression of the pruned leaves", ylabel="Accuracy")
    _finish(right, title="The same networks by cost", xlabel="Epochs of training, all rounds")
    for axes in (left, right):
        axes.get_legend().remove()
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(figure, path)


def plot_compaction(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws accuracy against the remaining MACs, before and after fine-tuning.

    Args:
        rows: one row for each method and budget: `method` ("none" is the dense network), `budget`
            (MACs allowed) and `macs` (MACs remaining) as fractions of the dense network's, `before`
            and `accuracy` as fractions, `before SD` and `SD` their standard deviations, or None. A
            method without `before` is in the right panel only.
        path: the PNG file to write, atomically. Its folder is created.

    Raises:
        ValueError: if `rows` is empty.

    Example:
        >>> import pathlib, tempfile
        >>> row = {"method": "none", "budget": 1.0, "macs": 1.0, "before": 0.8, "before SD": 0.0}
        >>> row |= {"accuracy": 0.9, "SD": 0.01}
        >>> small = row | {"method": "l1", "budget": 0.5, "macs": 0.49}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_compaction([row, small], f"{folder}/a.png")
        ...     pathlib.Path(folder, "a.png").read_bytes()[1:4]
        b'PNG'
    """
    if not rows:
        raise ValueError("`rows` must have one row for each method and budget, but is empty.")
    figure = _figure(11.0, 4.4)
    panels = figure.subplots(1, 2)
    cut = [
        {**row, "accuracy": row["before"], "SD": row["before SD"]}
        for row in rows
        if row["before"] is not None
    ]
    spread = ": mean and SD over seeds" if any(row["SD"] is not None for row in rows) else ""
    titles = f"Before fine-tuning{spread}", "After fine-tuning"
    ticks = sorted({row["budget"] for row in rows if row["method"] != "none"}) or [1.0]
    for axes, shown, title in zip(panels, (cut, rows), titles, strict=True):
        _draw_methods(axes, shown, lambda row: -math.log(row["macs"]), shift=0.02, of=rows)
        axes.set_xticks([-math.log(m) for m in ticks], [f"{m:.4g}" for m in ticks])
        axes.set_xlim(-math.log(ticks[-1]) - 0.25, -math.log(ticks[0]) + 0.25)
        _finish(axes, title=title, xlabel="MACs, relative to dense", ylabel="Test accuracy")
        axes.get_legend().remove()
    handles = panels[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False)
    _save(figure, path)


def plot_tradeoffs(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    labels: Mapping[str, str] = _COSTS,
) -> None:
    """Draws accuracy against two costs side by side, such as training time and size.

    A line joins the rows that no other row beats in both (the Pareto front). Up and to the left is
    better.

    Args:
        rows: one row for each way to train: `arm` is its name; `accuracy`, `seconds` of training
            and `parameters` are relative to the dense network, `accuracy SD` and `seconds SD`
            standard deviations of these, or None.
        path: the PNG file to write, atomically. Its folder is created.
        labels: key of a cost in the rows -> its name, for other costs than these two.

    Raises:
        ValueError: if `rows` is empty, or `labels` does not have two entries.

    Example:
        >>> import pathlib, tempfile
        >>> row = {"arm": "dense", "accuracy": 1.0, "accuracy SD": 0.01, "seconds": 1.0}
        >>> row |= {"seconds SD": None, "parameters": 1.0}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_tradeoffs([row], f"{folder}/tradeoffs.png")
        ...     pathlib.Path(folder, "tradeoffs.png").read_bytes()[1:4]
        b'PNG'
    """
    if not rows:
        raise ValueError("`rows` must have one row for each way to train, but is empty.")
    if len(labels) != 2:
        raise ValueError(f"`labels` must name two costs, but names {len(labels)}.")
    figure = _figure(11.0, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for index, row in enumerate(rows):
            axes.errorbar(
                row[key],
                row["accuracy"],
                row["accuracy SD"] or 0,
                row.get(f"{key} SD") or 0,
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],
                linestyle="none",
                markersize=6,
                capsize=3,
                label=row["arm"],
            )
        best = [row for row in rows if not any(_beats(other, row, key) for other in rows)]
        best.sort(key=lambda row: row[key])
        axes.plot(
            [row[key] for row in best],
            [row["accuracy"] for row in best],
            color="#999999",
            linewidth=0.8,
            zorder=0,
        )
        _finish(axes, title=f"Accuracy by {label.lower()}", xlabel=f"{label}, relative to dense")
        axes.set_xlim(left=0)
        axes.get_legend().remove()
    panels[0].set_ylabel("Test accuracy, relative to dense")
    panels[0].yaxis.set_major_formatter("{x:.1%}")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False, fontsize=8)
    _save(figure, path)


def plot_fronts(
    fronts: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    cost: str = "MACs, relative to the full network",
    lowest: float | None = None,
) -> None:
    """Draws accuracy against cost, one line for each way to get networks of several sizes.

    Args:
        fronts: label -> rows with `cost`, relative to a full network, `accuracy`, a fraction, and
            perhaps `SD`, the standard deviation of the accuracy, or None. Rows are joined in the
            order of their costs.
        path: the PNG file to write, atomically. Its folder is created.
        cost: what the horizontal axis shows.
        lowest: where the vertical axis begins; lower accuracies are not shown. Default: with all.

    Raises:
        ValueError: if `fronts` holds no row.

    Example:
        >>> import pathlib, tempfile
        >>> cut = [{"cost": 0.5, "accuracy": 0.9, "SD": 0.01}, {"cost": 0.2, "accuracy": 0.8}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_fronts({"as cut": cut}, f"{folder}/fronts.png")
        ...     pathlib.Path(folder, "fronts.png").read_bytes()[1:4]
        b'PNG'
    """
    known = {label: sorted(rows, key=lambda row: row["cost"]) for label, rows in fronts.items()}
    known = {label: rows for label, rows in known.items() if rows}
    if not known:
        raise ValueError("`fronts` must hold at least one row, but is empty.")
    figure = _figure(8.6, 4.6)
    axes = figure.subplots()
    for index, (label, rows) in enumerate(known.items()):
        axes.errorbar(
            [row["cost"] for row in rows],
            [row["accuracy"] for row in rows],
            [row.get("SD") or 0 for row in rows],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index // len(_COLOURS) % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            capsize=3,
            label=label,
        )
    axes.set_ylim(bottom=lowest)
    _finish(axes, title="Accuracy by cost", xlabel=cost, ylabel="Test accuracy")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.1%}")
    axes.legend().remove()  # it is beside the axes
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _save(figure, path)


def plot_searches(
    histories: Mapping[str, Sequence[Sequence[float]]], path: str | os.PathLike[str]
) -> None:
    """Draws the best score so far over the evaluations of searches, one line per search.

    Args:
        histories: label -> for each seed the best score after each evaluation, such as `Found.best`
            of `jaxprune.search`; values that are not finite are left out. The line is the mean over
            the seeds, and the band goes from the lowest to the highest. A search of one evaluation
            is a dashed line.
        path: the PNG file to write, atomically. Its folder is created.

    Raises:
        ValueError: if `histories` holds no evaluation.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     runs = {"random": [[0.1, 0.3], [0.2, 0.2]], "uniform": [[0.15]]}
        ...     plot_searches(runs, f"{folder}/searches.png")
        ...     pathlib.Path(folder, "searches.png").read_bytes()[1:4]
        b'PNG'
    """
    known = {label: [list(own) for own in runs if len(own)] for label, runs in histories.items()}
    known = {label: runs for label, runs in known.items() if runs}
    if not known:
        raise ValueError("`histories` must hold at least one evaluation, but is empty.")
    longest = max(len(own) for runs in known.values() for own in runs)
    figure = _figure(7.0, 4.2)
    axes = figure.subplots()
    for index, (label, runs) in enumerate(known.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        values = np.full((len(runs), max(map(len, runs))), np.nan)
        for row, own in zip(values, runs, strict=True):
            row[: len(own)] = np.where(np.isfinite(own), own, np.nan)
        known_at = ~np.isnan(values).all(0)
        steps = 1 + np.flatnonzero(known_at)
        values = values[:, known_at]
        if not len(steps):
            continue
        mean = np.nanmean(values, 0)
        name = f"{label}: {mean[-1]:.2%}"
        if values.shape[1] == 1:
            axes.axhline(mean[-1], color=colour, linestyle="--", linewidth=1.2, label=name)
            continue
        axes.plot(steps, mean, color=colour, linewidth=1.6, label=name)
        low, high = np.nanmin(values, 0), np.nanmax(values, 0)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlim(0, longest + 1)
    _finish(axes, title="Best score so far", xlabel="Evaluation", ylabel="Score on held-out images")
    _save(figure, path)


def plot_overlap(
    masks: Any, others: Any, path: str | os.PathLike[str], *, names: tuple[str, str]
) -> None:
    """Draws for each layer which weights two sets of masks keep: both, or only one of them.

    Args:
        masks: tree of bools, True where a weight is kept.
        others: tree of bools with the same paths.
        path: the PNG file to write, atomically. Its folder is created.
        names: what the two are called in the picture.

    Raises:
        ValueError: if paths or shapes differ, or nothing is pruned.

    Example:
        >>> import pathlib, tempfile
        >>> first, second = {"w": np.array([True, True, False])}, {"w": np.arange(3) != 1}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_overlap(first, second, f"{folder}/overlap.png", names=("one", "other"))
        ...     pathlib.Path(folder, "overlap.png").read_bytes()[1:4]
        b'PNG'
    """
    found = overlap(masks, others)
    if not found.leaves:
        raise ValueError("`masks` and `others` must prune at least one leaf, but keep everything.")
    ours, theirs = trees.places(masks), trees.places(others)
    shares = []
    for leaf in found.leaves:
        one, other = np.broadcast_arrays(
            np.asarray(ours[leaf], bool), np.asarray(theirs[leaf], bool)
        )
        parts = one & other, one & ~other, other & ~one
        shares.append([float(part.mean()) for part in parts])
    figure = _figure(7.0, 1.2 + 0.28 * len(shares))
    axes, start = figure.subplots(), np.zeros(len(shares))
    labels = "both", f"only {names[0]}", f"only {names[1]}"
    for index, label in enumerate(labels):
        width = np.array([row[index] for row in shares])
        rows = range(len(shares))
        axes.barh(rows, width, left=start, color=_COLOURS[index], height=0.8, label=label)
        start = start + width
    axes.set_yticks(range(len(shares)), [*found.leaves])
    axes.invert_yaxis()
    title = f"{found.total:.0%} of what {names[0]} keeps, {names[1]} keeps as well"
    _finish(axes, title=title, xlabel="Fraction of the weights of a layer that is kept", ylabel="")
    _save(figure, path)


def _beats(other: Mapping[str, Any], row: Mapping[str, Any], key: str) -> bool:
    """Tells whether `other` is at least as good in both and better in one."""
    gains = other["accuracy"] - row["accuracy"], row[key] - other[key]
    return min(gains) >= 0 and max(gains) > 0


def _draw_methods(
    axes: "Axes",
    rows: Sequence[Mapping[str, Any]],
    x: Callable[[Mapping[str, Any]], float],
    *,
    shift: float,
    of: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Draws a line with error bars for each method, and the dense runs as a band.

    `of` holds the rows of all methods of a figure, which decide their colours.
    """
    methods = [*dict.fromkeys(row["method"] for row in of or rows if row["method"] != "none")]
    for index, method in enumerate(methods):
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        # Shift the methods so that error bars do not overlap.
        offset = shift * (index - len(methods) / 2)
        axes.errorbar(
            [offset + x(row) for row in own],
            [row["accuracy"] for row in own],
            [row["SD"] or 0 for row in own],
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index // len(_COLOURS) % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            capsize=3,
            label=method,
        )
    for row in rows:
        if row["method"] == "none":
            mean, sd = row["accuracy"], row["SD"] or 0
            axes.axhline(mean, color="#000000", linewidth=1, label="dense")
            axes.axhspan(mean - sd, mean + sd, color="#000000", alpha=0.12, linewidth=0)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of the records that have this value."""
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _lower_limit(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str]
) -> float:
    """Finds the start of the accuracy axis: below all curves except the first tenth of each."""
    late: list[float] = []
    for records in histories.values():
        for values in (_points(records, key)[1] for key in keys):
            late += values[len(values) // 10 :]
    return max(0.0, min(late) - 0.05)


def _figure(width: float, height: float) -> "Figure":
    """Makes an empty figure outside pyplot's global state; sizes are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=140, layout="constrained")


def _finish(
    axes: "Axes", *, title: str, xlabel: str = "", ylabel: str = "", percent: str = "y"
) -> None:
    """Adds labels, grid, percentages and legend, the same on all plots."""
    from matplotlib.ticker import PercentFormatter

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    (axes.yaxis if percent == "y" else axes.xaxis).set_major_formatter(
        PercentFormatter(1.0, decimals=0)
    )
    if axes.get_legend_handles_labels()[1]:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1)} if percent == "x" else {}
        axes.legend(frameon=False, fontsize=8, **place)


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a PNG whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(target, "wb") as file:
        figure.savefig(file, format="png")
