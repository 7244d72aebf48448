"""What scripts/train.py leaves of a finished run: summary, table, plots and a page."""

import io
import resource
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax
import jax
import numpy as np
import optax

import jaxprune
from jaxprune import checkpoints, processes, reports, storage, structure, training
from jaxprune.experiments.network import widths_of
from jaxprune.experiments.optimizer import make_optimizer
from jaxprune.logs import MetricsLog

if TYPE_CHECKING:
    from jaxprune.experiments.train import Run

Records = Sequence[Mapping[str, Any]]  # as in metrics.jsonl


def write(run: "Run", state: training.TrainState) -> dict[str, Any]:
    """Writes all results of a finished run; the summary comes last, because it marks the end.

    Args:
        run: it has trained to its end. Its workdir gets summary.json, summary.txt, report.html,
            training.png and densities.png.
        state: the state at the end.

    Returns:
        The contents of summary.json.
    """
    workdir, log = run.workdir, run.metrics
    measured = {"sparsity": run.sparsity(state)} | run.total | run.peaks | on_unseen(run, state)
    dense = make_optimizer(run.config, optax.constant_schedule(0), None)
    state, masks = jax.tree.map(processes.on_host, (state, run.masks(state)))
    table = jaxprune.summarize(state.params, masks)
    summary = figures(log.records, int(state.step), log.lost)
    summary |= sizes(state, masks, dense) | environment() | measured
    summary |= {"records": log.count}
    summary |= {"switches": list(run.stages.shrinking.history)}
    summary |= {"widths": widths_of(run.experiment.model, state.params)}
    summary |= {"macs": run.stages.shrinking.cost}
    if run.stages.sparse is not None:
        summary |= {"kernels": run.stages.sparse.to_dict()}
    if not processes.is_first():
        return summary
    summary |= {"file_bytes": file_bytes(state.params, masks)}
    reports.plot_training({run.config.method: log.records}, workdir / "training.png")
    reports.plot_densities(table, workdir / "densities.png")
    write_page(run, state, summary)
    text = f"{table}\n\n" + "\n".join(f"{name:22} {value}" for name, value in summary.items())
    checkpoints.write_text(workdir / "summary.txt", text + "\n")
    checkpoints.write_json(workdir / "summary.json", summary)
    print(f"{text}\n\nwritten to {workdir}")
    return summary


def on_unseen(run: "Run", state: training.TrainState) -> dict[str, float]:
    """Returns the accuracy on the test images of a run that was evaluated on held-out ones."""
    unseen = run.experiment.source.unseen
    if unseen is None:
        return {}
    return {"unseen_accuracy": run.stages.steps.evaluate(state, unseen)["test_accuracy"]}


def sizes(
    state: training.TrainState, masks: Any, dense: optax.GradientTransformation
) -> dict[str, Any]:
    """Returns counts and bytes of a state; `dense` is its optimizer without pruning."""

    def nbytes(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    total = jaxprune.summarize(state.params, masks).total
    dense_bytes, sparse_bytes = reports.checkpoint_bytes(state.params, masks)
    state_bytes = nbytes(state.opt_state)
    return {
        "parameters": total.parameters,
        "nonzeros": total.nonzeros,
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "state_bytes": state_bytes,
        "pruning_state_bytes": state_bytes - nbytes(jax.eval_shape(dense.init, state.params)),
        "steps": int(state.step),
    }


def file_bytes(params: Any, masks: Any) -> dict[str, int | None]:
    """Returns the length of a file of `storage.save`, compressed, for each way to store values.

    None stands for int8 where a weight is not finite, which has no scale.
    """
    pruned, found = jaxprune.apply_masks(params, masks), {}
    is_finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(pruned))
    for values in ("exact", "bfloat16", "int8"):
        found[values] = None
        if is_finite or values != "int8":
            options: dict[str, Any] = {"values": values, "compression": "zlib"}
            found[values] = storage.save(io.BytesIO(), pruned, masks, **options).bytes
    return found


def environment() -> dict[str, Any]:
    """Returns the device and the versions that a result was made with."""
    return {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, jaxprune)},
    }


def is_untested(log: MetricsLog, end: int) -> bool:
    """Says whether the last step must be evaluated again, because its record is lost."""
    return processes.on_first(lambda: not log.has(end, "test_accuracy"))


def figures(records: Records, end: int, lost: int) -> dict[str, Any]:
    """What a summary takes from metrics.jsonl: figures of the last step, never of an earlier one.

    Args:
        records: lines of metrics.jsonl that are left.
        end: the last step.
        lost: how many other lines there were.

    Returns:
        Figures by name; what is lost is None, and `missing` says why.
    """

    def final(name: str) -> float | None:
        found = [record[name] for record in records if record["step"] == end and name in record]
        return found[-1] if found else None

    times = [record["seconds_per_step"] for record in records if "seconds_per_step" in record]
    names = "test_accuracy", "test_loss", "train_loss"
    found: dict[str, Any] = {name: final(name) for name in names}
    found |= {"seconds_per_step": statistics.median(times) if times and not lost else None}
    why = f"metrics.jsonl has lost the record of step {end}"
    missing = {name: why for name, value in found.items() if value is None}
    if "seconds_per_step" in missing:
        missing["seconds_per_step"] = (
            f"metrics.jsonl has lost {lost} records" if lost else "no step was timed"
        )
    return found | {"missing": missing}


def write_page(run: "Run", state: training.TrainState, summary: Mapping[str, Any]) -> None:
    """Writes the story of a run as a page."""
    config, groups = run.config, run.stages.stage.groups
    widths = {}
    if groups and config.method != "none":
        keep = structure.masked_channels(groups, state.opt_state)
        widths = {name: (group.full, int(keep[name].sum())) for name, group in groups.items()}
    facts = {
        "Test accuracy": f"{summary['test_accuracy']:.2%}",
        "Parameters": summary["parameters"],
        "MACs per example": summary["macs"],
        "Training": f"{summary['seconds']:.0f} s, {summary['steps']} steps",
        "Sparsity": f"{summary['sparsity']:.1%}",
        "Device": summary["device"],
        "Versions": summary["versions"],
    }
    reports.write_page(
        run.workdir / "report.html",
        title=f"{config.model} on {config.dataset}: {config.method}, seed {config.seed}",
        records=run.metrics.records,
        switches=summary["switches"],
        facts=facts,
        widths=widths,
    )


def peaks(step_bytes: int, earlier: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns the most bytes so far, of this process and of those that trained before it.

    Args:
        step_bytes: of a step of the present stage.
        earlier: what this function has returned before; checkpoints hold it.

    Returns:
        Bytes by name; None where the device does not count.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    now = {
        "step_peak_bytes": step_bytes,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    known = {name: [n for n in (now[name], earlier.get(name)) if n is not None] for name in now}
    return {name: max(numbers, default=None) for name, numbers in known.items()}
