"""What scripts/train.py leaves of a finished run: summary, table, plots and a page."""

import resource
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import optax

import jaxprune
from jaxprune import checkpoints, models, processes, reports, structure, training
from jaxprune.experiments import stages
from jaxprune.experiments.config import Config
from jaxprune.experiments.experiment import Experiment, make_optimizer
from jaxprune.logs import MetricsLog

Records = Sequence[Mapping[str, Any]]  # as in metrics.jsonl


def write_results(
    config: Config,
    experiment: Experiment,
    present: stages.Present,
    state: training.TrainState,
    masks: Any,
    log: MetricsLog,
    measured: Mapping[str, Any],
    workdir: Path,
) -> dict[str, Any]:
    """Writes everything; the summary comes last, because it marks a finished run.

    Args:
        config: of the run.
        experiment: of the run.
        present: its last stage.
        state: at the end.
        masks: at the end.
        log: metrics.jsonl; it may have lost lines.
        measured: sparsity, seconds and peaks.
        workdir: gets summary.json, summary.txt, report.html, training.png and densities.png.

    Returns:
        What is in summary.json.
    """
    state, masks = jax.tree.map(processes.on_host, (state, masks))
    table = jaxprune.summarize(state.params, masks)
    records = log.records
    summary = summarize(config, state, masks, records, log.lost) | dict(measured)
    summary |= {"records": log.count}
    summary |= {"switches": list(present.history)}
    summary |= {"widths": models.widths_of(state.params)._asdict()}
    summary |= {"macs": stages.costs(config, experiment, present)["macs"]}
    if not processes.is_first():
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
    config: Config, state: training.TrainState, masks: Any, records: Records, lost: int
) -> dict[str, Any]:
    """What other scripts read from summary.json."""

    def nbytes(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    total = jaxprune.summarize(state.params, masks).total
    dense_bytes, sparse_bytes = reports.checkpoint_bytes(state.params, masks)
    dense = make_optimizer(config, optax.constant_schedule(0), None)
    state_bytes = nbytes(state.opt_state)
    return figures(records, int(state.step), lost) | {
        "parameters": total.parameters,
        "nonzeros": total.nonzeros,
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "state_bytes": state_bytes,
        "pruning_state_bytes": state_bytes - nbytes(jax.eval_shape(dense.init, state.params)),
        "steps": int(state.step),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, jaxprune)},
    }


def is_untested(log: MetricsLog, end: int) -> bool:
    """Whether the evaluation of the last step is to be made again, because its line is lost."""
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
    found: dict[str, Any] = {name: final(name) for name in ("test_accuracy", "train_loss")}
    found |= {"seconds_per_step": statistics.median(times) if times and not lost else None}
    why = f"metrics.jsonl has lost the record of step {end}"
    missing = {name: why for name, value in found.items() if value is None}
    if "seconds_per_step" in missing:
        missing["seconds_per_step"] = (
            f"metrics.jsonl has lost {lost} records" if lost else "no step was timed"
        )
    return found | {"missing": missing}


def write_page(
    config: Config,
    present: stages.Present,
    state: training.TrainState,
    summary: Mapping[str, Any],
    records: Records,
    path: Path,
) -> None:
    """The story of a run as a page."""
    widths, network = {}, present.stage.network
    if network is not None and config.method != "none":
        keep = structure.masked_channels(network.groups, state.opt_state)
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


def peaks(present: stages.Present, earlier: Mapping[str, Any]) -> dict[str, int | None]:
    """The most bytes so far, of this process and of those that trained before it.

    Args:
        present: the stage of the run.
        earlier: what this has returned before; checkpoints hold it.

    Returns:
        Bytes by name; None where the device does not count.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    now = {
        "step_peak_bytes": present.peak_bytes,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    known = {name: [n for n in (now[name], earlier.get(name)) if n is not None] for name in now}
    return {name: max(numbers, default=None) for name, numbers in known.items()}
