"""Train a ResNet and prune it while it learns.

    python scripts/train.py digits_resnet8
    python scripts/train.py fashion_resnet8 --sparsity 0.9 --seed 1
    python scripts/train.py digits_resnet8 --help      # every option with its value there

A run can be stopped at any time; the same command goes on where it was and ends with the same
numbers. Everything that it writes is in --workdir:

    config.json     the resolved configuration
    metrics.jsonl   one record a line: loss, accuracy, sparsity, speed, test accuracy
    checkpoints/    Orbax: state, data position and configuration of the newest steps
    tensorboard/    the same metrics for TensorBoard
    summary.json    accuracy, counts, bytes and times of the finished run; summary.txt is the table
    training.png, densities.png
"""

import contextlib
import dataclasses
import logging
import math
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import flax
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

import jaxprune
from jaxprune import budgets, checkpoints, data, models, rates, reports, scores, training, trees
from jaxprune.metrics import MetricsLog, show_progress

ModelName = Literal[
    "resnet8", "resnet20", "resnet32", "resnet56", "resnet110",
    "resnet18", "resnet34", "resnet50", "resnet101",
]  # fmt: skip
Method = Literal["none", "agip", "magnitude", "gradient", "random"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of a run; the comments are the help text."""

    dataset: Literal["digits", "fashion_mnist", "synthetic"] = "digits"  # images to train on
    data_dir: str = ""  # folder of prepared data; empty: the user's cache
    source_dir: str = ""  # folder with the data set's original files; empty: download them
    image_size: int = 224  # height and width of synthetic images
    model: ModelName = "resnet8"  # 18, 34, 50, 101: for large images; the others: for small ones
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    seed: int = 0  # of initialisation, data order and augmentation

    epochs: float = 30.0  # passes over the training images
    steps: int = 0  # training steps; 0: as many as the epochs give
    batch_size: int = 128  # images per step, over all devices
    pad: int = 0  # augmentation: shift by up to so many pixels
    flip: bool = False  # augmentation: mirror half of the images

    learning_rate: float = 0.1  # the peak; it falls to 0 along a cosine
    warmup_steps: int = 0  # steps in which the learning rate rises from 0 to its peak
    momentum: float = 0.9  # of SGD, in [0, 1)
    nesterov: bool = False  # Nesterov's momentum
    weight_decay: float = 5e-4  # of kernels; biases and norm parameters have none
    label_smoothing: float = 0.0  # share of the target that is spread over all classes

    method: Method = "agip"  # none: dense; agip: default score; others: the same with that score
    sparsity: float = 0.72  # fraction of the kernels' weights that end as zeros, in [0, 1)
    prune_start: float = 0.1  # when sparsity starts to rise, as a fraction of all steps
    prune_stop: float = 0.6  # when sparsity is reached, as a fraction of all steps
    prune_every: int = 100  # steps between two mask updates
    decay: float | None = 0.99  # of the running average of gradients; None: use the momentum
    budget: Literal["global", "uniform"] = "global"  # one ranking of all weights, or one a layer
    regrow: float = 0.0  # fraction of the kept weights that moves at the first mask update
    rate: Literal["none", "density", "statistic"] = "none"  # what survivors' rates adapt to

    workdir: str = ""  # folder of all outputs; empty: runs/ and a name made of the main options
    overwrite: bool = False  # delete the run that the workdir holds and start afresh
    eval_every: int = 200  # steps between two evaluations on the test images
    eval_batch_size: int = 512  # images per step of an evaluation
    save_every: int = 500  # steps between two checkpoints
    log_every: int = 50  # steps between two lines of metrics
    chunk: int = 0  # steps per call; 0: 1 on CPU (convolutions in loops are slow there), else 50

    def __post_init__(self) -> None:
        """Checks every value; one error names all that are out of range."""
        kinds = get_type_hints(Config).items()
        choices = {name: get_args(kind) for name, kind in kinds if get_origin(kind) is Literal}
        bad = [
            f"`{name}` must be one of {', '.join(names)}; got {getattr(self, name)!r}"
            for name, names in choices.items()
            if getattr(self, name) not in names
        ]
        at_least_1 = "batch_size eval_batch_size image_size prune_every eval_every save_every"
        rules = [
            ("at least 0", lambda x: x >= 0, "steps pad warmup_steps weight_decay chunk seed"),
            ("at least 1", lambda x: x >= 1, f"{at_least_1} log_every"),
            ("above 0", lambda x: 0 < x < math.inf, "epochs learning_rate"),
            ("in [0, 1)", lambda x: 0 <= x < 1, "sparsity momentum label_smoothing regrow"),
            ("in [0, 1)", lambda x: x is None or 0 <= x < 1, "decay"),
            ("in [0, 1]", lambda x: 0 <= x <= 1, "prune_start prune_stop"),
        ]
        for rule, holds, names in rules:
            values = [(name, getattr(self, name)) for name in names.split()]
            bad += [f"`{name}` must be {rule}; got {x}" for name, x in values if not holds(x)]
        if self.prune_stop < self.prune_start:
            bad.append(
                f"`prune_stop` must not be less than `prune_start` ({self.prune_start}); "
                f"got {self.prune_stop}"
            )
        if bad:
            raise ValueError("\n".join(bad))


CONFIGS = {
    "digits_resnet8": (
        "ResNet-8 on scikit-learn's 8x8 digits: seconds on a CPU, no download.",
        Config(epochs=40.0, batch_size=64, pad=1, prune_every=20, log_every=20, eval_every=110),
    ),
    "fashion_resnet8": (
        "ResNet-8 on Fashion-MNIST: minutes on a CPU.",
        Config(
            dataset="fashion_mnist",
            epochs=5.0,
            pad=2,
            flip=True,
            learning_rate=0.4,
            warmup_steps=50,
        ),  # fmt: skip
    ),
    "fashion_resnet20": (
        "ResNet-20 on Fashion-MNIST: for an accelerator.",
        Config(dataset="fashion_mnist", model="resnet20", pad=2, flip=True, eval_every=500),
    ),
    "synthetic_resnet50": (
        "ResNet-50 on made-up ImageNet-sized images: a benchmark.",
        Config(
            dataset="synthetic", model="resnet50", dtype="bfloat16", steps=200, eval_batch_size=128
        ),
    ),
}

# What may change when a run goes on; all else must be as it was.
FREE = {"workdir", "overwrite", "data_dir", "source_dir"}
# What --overwrite deletes, config.json last: it is what says that the folder holds a run.
OUTPUTS = (
    "summary.json", "summary.txt", "training.png", "densities.png",
    "metrics.jsonl", "checkpoints", "tensorboard", "config.json",
)  # fmt: skip


def train(config: Config) -> dict[str, Any]:
    """One run, from the configuration to the summary; goes on where an earlier one stopped."""
    began = time.perf_counter()
    workdir = Path(config.workdir or default_workdir(config))
    options = checkpoints.fields(config, leave_out=FREE)
    with plain_errors():
        checkpoints.check_writable(workdir)
        if config.overwrite:
            delete_run(workdir)
        saved = checkpoints.read_json(workdir / "config.json")
        summary = checkpoints.read_json(workdir / "summary.json")
        if saved is not None:
            checkpoints.check_config(saved, options, str(workdir))
        if summary is not None:
            print((workdir / "summary.txt").read_text())
            print(f"{workdir} is finished; --overwrite trains it anew.")
            return summary

    # Mesh and data. Small sets live on every device; a batch is a row of indices.
    mesh = training.make_mesh()
    with plain_errors():
        for batch_size in (config.batch_size, config.eval_batch_size):
            training.check_batch(batch_size, mesh)
        dataset = load_data(config)
        batches = data.index_batches(len(dataset.train.labels), config.batch_size, seed=config.seed)
    train_set, test_set = training.replicate((dataset.train, dataset.test), mesh)
    epoch = len(dataset.train.labels) // config.batch_size
    steps = config.steps or max(1, round(config.epochs * epoch))

    # Model and optimizer.
    model = getattr(models, config.model)(
        num_classes=dataset.num_classes,
        in_channels=dataset.train.images.shape[-1],
        dtype=config.dtype,
        rngs=nnx.Rngs(config.seed),
    )
    schedule = learning_rate(config, steps)
    with plain_errors():
        tx = make_optimizer(config, schedule, steps)
        graphdef, state = training.create_state(model, tx, mesh)
    key = jax.random.key(config.seed)
    chunk = 1 if jax.default_backend() == "cpu" else min(50, config.log_every)

    def prepare_test(images: jax.Array) -> jax.Array:
        return data.normalize(images, dataset.mean, dataset.std, config.dtype)

    def prepare_train(key: jax.Array, images: jax.Array) -> jax.Array:
        return prepare_test(data.augment(key, images, pad=config.pad, flip=config.flip))

    step_fn = training.make_train_step(
        graphdef, tx, prepare_train, label_smoothing=config.label_smoothing
    )
    run = training.make_chunk_step(step_fn, mesh)
    evaluate = training.make_evaluate(graphdef, prepare_test, mesh)

    # Restore.
    earlier = 0.0  # seconds of training before this process
    with plain_errors():
        manager = checkpoints.open_manager(workdir / "checkpoints")
        if manager.latest_step() is not None:
            state, record = checkpoints.restore(manager, state)
            checkpoints.check_config(record["config"], options, str(workdir))
            batches.set_state(record["data"])
            earlier = record["seconds"]
            print(f"{workdir}: going on from step {int(state.step)}")
    resolved = dataclasses.asdict(config) | {"workdir": str(workdir), "resolved_steps": steps}
    checkpoints.write_json(workdir / "config.json", resolved)

    def save(step: int, state: training.TrainState) -> None:
        record = {"data": batches.get_state(), "config": resolved}
        record["seconds"] = earlier + time.perf_counter() - began
        checkpoints.save(manager, step, state, record)

    # Loop.
    with (
        MetricsLog(workdir, int(state.step)) as metrics,
        show_progress(config.model, steps, int(state.step)) as show,
        checkpoints.stop_signals() as stopped,
    ):

        def log(step: int, state: training.TrainState, values: dict[str, float]) -> None:
            values["sparsity"] = sparsity_of(state.params, masks_of(config, state))
            values["learning_rate"] = float(schedule(step - 1))
            show(step, values)
            if not math.isfinite(values["train_loss"]):
                sys.exit(
                    f"error: the loss is {values['train_loss']} at step {step}; lower "
                    f"`learning_rate` ({config.learning_rate}). Earlier checkpoints are kept."
                )
            metrics.write(step, values)

        def test(step: int, state: training.TrainState) -> None:
            values = evaluate(state, test_set, config.eval_batch_size)
            show(step, values)
            metrics.write(step, values)

        hooks = [training.Hook(config.eval_every, test), training.Hook(config.save_every, save)]
        state = training.fit(
            state, steps, run, train_set, batches, key, mesh,
            chunk=config.chunk or chunk, log_every=config.log_every, on_log=log, hooks=hooks,
            should_stop=lambda: bool(stopped),
        )  # fmt: skip
        save(int(state.step), state)
    manager.close()
    if int(state.step) < steps:
        print(f"stopped and saved at step {int(state.step)}; the same command goes on from there")
        sys.exit(130 if signal.SIGINT in stopped else 0)

    # Report. The summary comes last: it marks a finished run.
    masks = masks_of(config, state)
    table = jaxprune.summarize(state.params, masks)
    summary = summarize(config, state, masks, metrics.records)
    summary["seconds"] = earlier + time.perf_counter() - began
    reports.plot_training({config.method: metrics.records}, workdir / "training.png")
    reports.plot_densities(table, workdir / "densities.png")
    text = f"{table}\n\n" + "\n".join(f"{name:22} {value}" for name, value in summary.items())
    checkpoints.write_text(workdir / "summary.txt", text + "\n")
    checkpoints.write_json(workdir / "summary.json", summary)
    print(f"{text}\n\nwritten to {workdir}")
    return summary


def default_workdir(config: Config) -> str:
    """runs/ and what tells most runs apart."""
    method = config.method if config.method == "none" else f"{config.method}-{config.sparsity:g}"
    return f"runs/{config.dataset}-{config.model}-{method}-seed{config.seed}"


def delete_run(workdir: Path) -> None:
    """Removes what an earlier run wrote and nothing else; nothing at all where there was no run."""
    for path in (workdir / name for name in OUTPUTS if (workdir / "config.json").exists()):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def load_data(config: Config) -> data.Dataset:
    """The data set; of synthetic images just enough for four batches."""
    folders = {"data_dir": config.data_dir or None, "source_dir": config.source_dir or None}
    if config.dataset != "synthetic":
        return data.load(config.dataset, **folders)
    shape = (config.image_size, config.image_size, 3)
    sizes = {"train_size": 4 * config.batch_size, "test_size": config.batch_size}
    return data.load("synthetic", image_shape=shape, num_classes=1000, **sizes)


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine down to 0 at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
    )


def make_optimizer(
    config: Config, schedule: optax.Schedule, steps: int
) -> optax.GradientTransformation:
    """SGD with momentum and weight decay on kernels, then pruning."""

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    transforms = [
        optax.add_decayed_weights(config.weight_decay, mask=kernels),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    ]
    if config.method != "none":
        score = scores.taylor if config.method == "agip" else getattr(scores, config.method)
        parts = config.prune_start, config.prune_stop
        start, stop = (min(round(steps * part), steps - 1) for part in parts)
        rules = {"none": None, "density": rates.by_density(), "statistic": rates.by_statistic()}
        prune = jaxprune.agip_transform(
            config.sparsity,
            every=config.prune_every,
            start=start,
            stop=stop,
            decay=config.decay,
            score=score(config.seed) if config.method == "random" else score,
            budget=budgets.uniform if config.budget == "uniform" else budgets.global_budget(),
            regrow=config.regrow,
            rate=rules[config.rate],
        )
        transforms.append(prune)
    return jaxprune.chain(*transforms)


def masks_of(config: Config, state: training.TrainState) -> Any:
    """The masks; all True for a dense run."""
    if config.method == "none":
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), state.params)
    return jaxprune.get_masks(state.opt_state)


def sparsity_of(params: Any, masks: Any) -> float:
    """Fraction of the prunable weights that is masked."""
    flags = trees.prunable_flags(params)
    kernels = [mask for mask, flag in zip(jax.tree.leaves(masks), flags, strict=True) if flag]
    kept = sum(int(count) for count in jax.device_get(count_true(kernels)))
    return 1 - kept / sum(mask.size for mask in kernels)


@jax.jit
def count_true(masks: list[jax.Array]) -> list[jax.Array]:
    """How many weights each mask keeps; one dispatch for all."""
    return [mask.sum(dtype=jnp.int32) for mask in masks]


def summarize(
    config: Config, state: training.TrainState, masks: Any, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What other scripts read from summary.json."""

    def nbytes(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def column(name: str) -> list[float]:
        return [record[name] for record in records if name in record]

    total = jaxprune.summarize(state.params, masks).total
    dense_bytes, sparse_bytes = reports.checkpoint_bytes(state.params, masks)
    dense = make_optimizer(
        dataclasses.replace(config, method="none"), optax.constant_schedule(0), 1
    )
    state_bytes = nbytes(state.opt_state)
    return {
        "test_accuracy": column("test_accuracy")[-1],
        "train_loss": column("train_loss")[-1],
        "parameters": total.parameters,
        "nonzeros": total.nonzeros,
        "sparsity": sparsity_of(state.params, masks),
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "state_bytes": state_bytes,
        "pruning_state_bytes": state_bytes - nbytes(jax.eval_shape(dense.init, state.params)),
        "seconds_per_step": statistics.median(column("seconds_per_step") or [math.nan]),
        "steps": int(state.step),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax, jaxprune)},
    }


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turns errors that a user can mend into one message without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def main(args: Sequence[str] | None = None) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
    with plain_errors():
        config = tyro.extras.overridable_config_cli(CONFIGS, description=__doc__, args=args)
    train(config)


if __name__ == "__main__":
    main()
