"""Configurations of the training scripts: every knob of a run, and the named sets of them."""

import dataclasses
import math
from typing import Literal, get_args, get_origin, get_type_hints

ModelName = Literal[
    "resnet8", "resnet20", "resnet32", "resnet56", "resnet110",
    "resnet18", "resnet34", "resnet50", "resnet101",
]  # fmt: skip
DatasetName = Literal["digits", "fashion_mnist", "synthetic", "imagenet2012"]
Method = Literal[
    "none", "agip", "gradient", "magnitude", "saliency", "random", "set", "rigl",
    "straight_through", "acdc", "snip", "grasp", "synflow",
]  # fmt: skip
_OF_CHANNELS = ("none", "agip", "magnitude", "random")
Pattern = Literal["weights", "2:4", "1:4", "4x4", "8x8", "filters"]
_PATTERNED = ("none", "agip", "gradient", "magnitude", "saliency", "random")
Budget = Literal["default", "global", "uniform", "erdos_renyi_kernel"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob of a run; the comments are the help text."""

    dataset: DatasetName = "digits"  # images to train on
    data_dir: str = ""  # folder of prepared data; empty: the user's cache
    source_dir: str = ""  # folder with the data set's original files; empty: download them
    image_size: int = 224  # height and width of synthetic images and of ImageNet's crops
    workers: int = 0  # imagenet2012: processes that decode; 0: threads of this one
    threads: int = 0  # imagenet2012: of each such process; 0: 1 with workers, 4 without
    model: ModelName = "resnet8"  # 18, 34, 50, 101: for large images; the others: for small ones
    widths: str = ""  # of all layers as JSON, such as summary.json has; empty: the published ones
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters are float32
    remat: bool = False  # keep only convolutions for the backward pass: less memory, not on CPU
    parts: int = 1  # of a batch, one after the other: less memory; fewer as a network gets smaller
    seed: int = 0  # of initialisation, data order and augmentation

    epochs: float = 30.0  # passes over the training images
    steps: int = 0  # training steps; 0: as many as the epochs give
    batch_size: int = 128  # images per step, over all devices
    pad: int = 0  # augmentation: shift by up to so many pixels
    flip: bool = False  # augmentation: mirror half of the images
    small_images: float = 1.0  # height and width of the images at first, relative to the data's
    small_until: float = 0.3  # until when images are small, as a fraction of all steps
    validation: int = 0  # so many training images, the last ones, take the place of the test images

    learning_rate: float = 0.1  # the highest one, after the warm-up
    schedule: Literal["cosine", "steps"] = "cosine"  # cosine: falls to 0; steps: x .1 at 1/2, 3/4
    warmup_steps: int = 0  # steps in which the learning rate rises from 0 to its peak
    momentum: float = 0.9  # of SGD, in [0, 1)
    nesterov: bool = False  # Nesterov's momentum
    weight_decay: float = 5e-4  # of kernels; biases and norm parameters have none
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    ema: float = 0.0  # decay of an average of the parameters that is tested instead; 0: none

    method: Method = "agip"  # none: dense; gradient: agip by gradient alone; see docs/methods.md
    sparsity: float = 0.72  # fraction of the kernels' weights that end as zeros, in [0, 1)
    prune_start: float = 0.1  # when sparsity starts to rise, as a fraction of all steps
    prune_stop: float = 0.6  # when sparsity is reached, as a fraction of all steps
    prune_every: int = 100  # steps between two mask updates
    budget: Budget = "default"  # default: the method's own; global: one ranking of all weights
    decay: float | None = 0.99  # agip: of the average of gradients; None: use the momentum
    regrow: float = 0.0  # agip: fraction of the kept weights that moves at the first mask update
    rate: Literal["none", "density", "statistic"] = "none"  # agip: what survivors' rates adapt to
    drop: float = 0.3  # set, rigl: fraction of the kept weights that moves at the first mask update
    phase: float = 0.05  # acdc: length of a phase, as a fraction of all steps
    pattern: Pattern = "weights"  # weights: which of them fall together; 4x4: inputs x outputs
    granularity: Literal["weights", "channels"] = "weights"  # channels: agip, magnitude, random
    compact: bool = False  # channels: remove what is masked while training goes on
    switches: int = 4  # compact: how often at most
    saving: float = 0.2  # compact: fraction of a step that a switch must save at least
    switch_steps: float = 50.0  # compact: what a switch costs, in steps of the dense network
    switch_delay: int = 10  # compact: steps in which the next network is compiled meanwhile
    rewarm_steps: int = 0  # compact: steps in which the learning rate rises again after a switch
    multiple: int = 0  # compact: of the widths that are left; 0: 8 on accelerators, 1 on CPU
    init_images: int = 1024  # snip, grasp: training images that are scored, in a single batch

    mesh: str = ""  # such as data=4,fsdp=2; fsdp splits parameters too; empty: data=all devices
    coordinator: str = ""  # several processes: address of the first, such as 10.0.0.1:1234
    processes: int = 1  # with coordinator: how many there are
    process: int = 0  # with coordinator: which one this is
    host_timeout: int = 100  # seconds after which a process that is not heard of is lost

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
        at_least_0 = "steps pad warmup_steps weight_decay chunk seed switches switch_steps multiple"
        at_least_0 += " rewarm_steps validation process workers threads"
        at_least_1 = "batch_size eval_batch_size image_size prune_every eval_every save_every parts"
        at_least_1 += " processes host_timeout"
        fractions = "sparsity momentum label_smoothing ema regrow drop saving"
        rules = [
            ("at least 0", lambda x: x >= 0, at_least_0),
            ("at least 1", lambda x: x >= 1, f"{at_least_1} log_every init_images switch_delay"),
            ("above 0", lambda x: 0 < x < math.inf, "epochs learning_rate"),
            ("in [0, 1)", lambda x: 0 <= x < 1, fractions),
            ("in [0, 1)", lambda x: x is None or 0 <= x < 1, "decay"),
            ("in [0, 1]", lambda x: 0 <= x <= 1, "prune_start prune_stop phase small_until"),
            ("in (0, 1]", lambda x: 0 < x <= 1, "small_images"),
        ]
        for rule, holds, names in rules:
            values = [(name, getattr(self, name)) for name in names.split()]
            bad += [f"`{name}` must be {rule}; got {x}" for name, x in values if not holds(x)]
        if self.granularity == "channels" and self.method not in _OF_CHANNELS:
            names = ", ".join(_OF_CHANNELS)
            bad.append(f"`method` must be one of {names} with channels; got {self.method!r}")
        if self.pattern != "weights" and (
            self.granularity == "channels" or self.method not in _PATTERNED
        ):
            names = " or ".join(_PATTERNED)
            bad.append(f"`pattern` {self.pattern} needs `granularity` weights and `method` {names}")
        if self.compact and (self.granularity != "channels" or self.method == "none"):
            bad.append("`compact` needs a method that prunes, and `granularity` channels")
        if self.process >= self.processes:
            bad.append(
                f"`process` must be less than `processes` ({self.processes}); got {self.process}"
            )
        if self.processes > 1 and not self.coordinator:
            bad.append("`processes` needs `coordinator`, the address of the first one")
        if self.batch_size % self.parts:
            bad.append(f"`parts` must divide `batch_size` ({self.batch_size}); got {self.parts}")
        if self.compact and self.switch_delay >= self.prune_every:
            bad.append(
                f"`switch_delay` must be less than `prune_every` ({self.prune_every}): masks must "
                f"not change meanwhile; got {self.switch_delay}"
            )
        if self.prune_stop < self.prune_start:
            bad.append(
                f"`prune_stop` must not be less than `prune_start` ({self.prune_start}); "
                f"got {self.prune_stop}"
            )
        if bad:
            raise ValueError("\n".join(bad))


# He et al. with the changes of Goyal et al.: 90 epochs, batch 1024, linear scaling, 5 epochs of
# warm-up; label smoothing as in Szegedy et al.
_IMAGENET = Config(
    dataset="imagenet2012",
    model="resnet50",
    dtype="bfloat16",
    epochs=90.0,
    batch_size=1024,
    learning_rate=0.4,
    warmup_steps=6255,
    nesterov=True,
    weight_decay=1e-4,
    label_smoothing=0.1,
    ema=0.9999,
    method="none",
    eval_batch_size=1024,
    eval_every=5004,
    save_every=1251,
    log_every=100,
    workers=8,
)

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
    "imagenet_resnet50": (
        "ResNet-50 on ImageNet, dense: 90 epochs of batch 1024.",
        _IMAGENET,
    ),
    "imagenet_resnet50_agip": (
        "The same with AGIP: 72 % of the weights go between 10 and 60 % of the steps.",
        dataclasses.replace(_IMAGENET, method="agip"),
    ),
    "imagenet_resnet50_rewind": (
        "The same for scripts/rewind.py: step schedule, retraining at the early learning rate.",
        dataclasses.replace(_IMAGENET, schedule="steps", ema=0.0),
    ),
}
