"""What scripts/train.py leaves of a finished run: summary, table, plots and a page."""

import math
import resource
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import hosts
import jax
import optax
import shrinking
from configs import Config
from experiment import Experiment, make_optimizer

import jaxprune
from jaxprune import checkpoints, compaction, models, processes, reports, training

Records = Sequence[Mapping[str, Any]]  # as in metrics.jsonl


def write_results(
    config: Config,
    experiment: Experiment,
    present: shrinking.Present,
    state: training.TrainState,
    masks: Any,
    records: Records,
    measured: Mapping[str, float],
    workdir: Path,
) -> dict[str, Any]:
    """Writes everything; the summary comes last, because it marks a finished run.

    Args:
        config: of the run.
        experiment: of the run.
        present: its last stage.
        state: at the end.
        masks: at the end.
        records: lines of metrics.jsonl.
        measured: sparsity and seconds.
        workdir: gets summary.json, summary.txt, report.html, training.png and densities.png.

    Returns:
        What is in summary.json.
    """
    state, masks = jax.tree.map(processes.on_host, (state, masks))
    table = jaxprune.summarize(state.params, masks)
    summary = summarize(config, state, masks, records) | dict(measured)
    summary |= {"switches": list(present.history)}
    summary |= {"widths": models.widths_of(state.params)._asdict()}
    summary |= costs_of(config, experiment, present, records)
    if not hosts.is_first():
        return summary
    reports.plot_training({config.method: records}, workdir / "training.png")
    reports.plot_densities(table, workdir / "densities.png")
    write_page(config, present, state, summary, records, workdir / "report.html")
    text = f"{table}\n\n" + "\n".join(f"{name:22} {value}" for name, value in summary.items())
    checkpoints.write_text(workdir / "summary.txt", text + "\n")
    checkpoints.write_json(workdir / "summary.json", summary)
    print(f"{text}\n\nwritten to {workdir}")
    return summary


def summarize(
    config: Config, state: training.TrainState, masks: Any, records: Records
) -> dict[str, Any]:
    """What other scripts read from summary.json."""

    def nbytes(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def column(name: str) -> list[float]:
        return [record[name] for record in records if name in record]

    total = jaxprune.summarize(state.params, masks).total
    dense_bytes, sparse_bytes = reports.checkpoint_bytes(state.params, masks)
    dense = make_optimizer(config, optax.constant_schedule(0), None)
    state_bytes = nbytes(state.opt_state)
    return {
        "test_accuracy": column("test_accuracy")[-1],
        "train_loss": column("train_loss")[-1],
        "parameters": total.parameters,
        "nonzeros": total.nonzeros,
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "state_bytes": state_bytes,
        "pruning_state_bytes": state_bytes - nbytes(jax.eval_shape(dense.init, state.params)),
        "seconds_per_step": statistics.median(column("seconds_per_step") or [math.nan]),
        "steps": int(state.step),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, jaxprune)},
    }


def write_page(
    config: Config,
    present: shrinking.Present,
    state: training.TrainState,
    summary: Mapping[str, Any],
    records: Records,
    path: Path,
) -> None:
    """The story of a run as a page."""
    widths, network = {}, present.stage.network
    if network is not None and config.method != "none":
        keep = compaction.masked_channels(network.groups, state.opt_state)
        widths = {
            name: (group.full, int(keep[name].sum())) for name, group in network.groups.items()
        }
    facts = {
        "Test accuracy": f"{summary['test_accuracy']:.2%}",
        "Parameters": summary["parameters"],
        "MACs of an image": summary["macs"],
        "Training": f"{summary['seconds']:.0f} s, {summary['steps']} steps",
        "Sparsity": f"{summary['sparsity']:.1%}",
        "Device": summary["device"],
        "Versions": summary["versions"],
    }
    title = f"{config.model} on {config.dataset}: {config.method}, seed {config.seed}"
    switches = summary["switches"]
    reports.write_page(
        path, title=title, records=records, switches=switches, facts=facts, widths=widths
    )


def costs_of(
    config: Config,
    experiment: Experiment,
    present: shrinking.Present,
    records: Records,
) -> dict[str, Any]:
    """Arithmetic and memory, for summary.json."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "macs": shrinking.costs(config, experiment, present)["macs"],
        "step_peak_bytes": max(record.get("peak_bytes", 0) for record in records),
        "device_peak_bytes": stats.get("peak_bytes_in_use"),  # None: the device does not count
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
