"""The configuration of a run: every option, its range, and named sets of options."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

ModelName = Literal[
    "resnet8", "resnet20", "resnet32", "resnet56", "resnet110",
    "resnet18", "resnet34", "resnet50", "resnet101",
    "mobilenet_v1", "mobilenet_v2", "decoder_mini", "decoder_124m",
]  # fmt: skip
DatasetName = Literal["digits", "fashion_mnist", "synthetic", "imagenet2012", "text"]
Method = Literal[
    "none", "agip", "gradient", "magnitude", "saliency", "random", "set", "rigl",
    "straight_through", "acdc", "snip", "grasp", "synflow",
]  # fmt: skip
_OF_CHANNELS = ("none", "agip", "magnitude", "random")
Pattern = Literal["weights", "2:4", "1:4", "4x4", "8x8", "filters"]
# Methods that need the gradients of removed weights at mask updates only, and no dense weights.
_WITH_KERNELS = (
    "agip", "gradient", "magnitude", "saliency", "random", "set", "rigl", "snip", "grasp",
    "synflow",
)  # fmt: skip
_PATTERNED = ("none", "agip", "gradient", "magnitude", "saliency", "random")
Prunable = Literal["default", "pointwise"]
Budget = Literal["default", "global", "uniform", "erdos_renyi_kernel"]


Range = tuple[str, Callable[[Any], bool]]  # a rule in words, and whether a value obeys it


def _ranges() -> dict[str, Range]:
    """Returns the range of each number, by name."""
    at_least_0 = "at least 0", lambda x: x >= 0
    at_least_1 = "at least 1", lambda x: x >= 1
    above_0 = "above 0", lambda x: 0 < x < math.inf
    below_1 = "in [0, 1)", lambda x: 0 <= x < 1
    fraction = "in [0, 1]", lambda x: 0 <= x <= 1
    groups: dict[Range, tuple[str, ...]] = {
        at_least_0: (
            "steps", "pad", "warmup_steps", "weight_decay", "chunk", "seed", "switches",
            "switch_steps", "multiple", "rewarm_steps", "validation", "process", "workers",
            "threads", "clip", "enlarge", "train_images",
        ),
        at_least_1: (
            "batch_size", "eval_batch_size", "image_size", "prune_every", "eval_every",
            "save_every", "parts", "processes", "host_timeout", "log_every", "init_images",
            "switch_delay", "length",
        ),
        above_0: ("epochs", "learning_rate"),
        below_1: (
            "sparsity", "momentum", "label_smoothing", "ema", "regrow", "drop", "saving",
            "fine_sparsity", "grow_at", "teacher",
        ),
        fraction: ("prune_start", "prune_stop", "phase", "small_until", "fine_start", "fine_stop"),
        ("in (0, 1]", lambda x: 0 < x <= 1): ("small_images", "grow_from"),
        ("in [0, 1)", lambda x: x is None or 0 <= x < 1): ("decay",),
    }  # fmt: skip
    return {name: rule for rule, names in groups.items() for name in names}


_RANGES = _ranges()


@dataclasses.dataclass(frozen=True)
class Config:
    """Every option of a run; the comments are the help text."""

    dataset: DatasetName = "digits"  # data set to train on
    data_dir: str = ""  # folder of prepared data; empty = the user's cache
    source_dir: str = ""  # folder with the data set's original files; empty = download them
    length: int = 256  # text: bytes of an example
    image_size: int = 224  # height and width of synthetic images and of ImageNet crops, in pixels
    enlarge: int = 0  # enlarge small images to this side in pixels, in three channels; 0 = off
    workers: int = 0  # imagenet2012: processes that decode images; 0 = decode in threads
    threads: int = 0  # imagenet2012: threads per such process; 0 = 1 with workers, 4 without
    model: ModelName = "resnet8"  # resnet18 to 101 and mobilenets: large images; decoders: text
    widths: str = ""  # widths of all layers as JSON, as in summary.json; empty = the published ones
    padding: Literal["SAME", "SYMMETRIC"] = "SAME"  # mobilenets: SYMMETRIC for sparse inference
    dtype: Literal["float32", "bfloat16"] = "float32"  # type of activations; parameters are float32
    scan: bool = False  # decoders: stack the layers and run them in a loop, which compiles faster
    remat: bool = False  # less memory: recompute cheap operations, of decoders all; not on CPU
    parts: int = 1  # micro-batches per batch (less memory); lowered as the network shrinks
    seed: int = 0  # seed of initialization, data order and augmentation

    epochs: float = 30.0  # passes over the training images
    steps: int = 0  # training steps; 0 = follow from epochs
    batch_size: int = 128  # images per step, over all devices
    pad: int = 0  # augmentation: shift images by up to this many pixels
    flip: bool = False  # augmentation: mirror half of the images
    small_images: float = 1.0  # size of the images at first, relative to the data set's; 1 = off
    small_until: float = 0.3  # fraction of all steps after which images have their full size
    validation: int = 0  # hold out the last N training images and evaluate on them instead
    train_images: int = 0  # small data sets: train on the first N images; 0 = on all

    learning_rate: float = 0.1  # highest learning rate, reached after the warm-up
    schedule: Literal["cosine", "steps"] = "cosine"  # cosine to 0, or times 0.1 at 1/2 and 3/4
    warmup_steps: int = 0  # steps in which the learning rate rises from 0 to its peak
    optimizer: Literal["sgd", "adamw"] = "sgd"  # adamw: averages of .9 (momentum) and .95
    momentum: float = 0.9  # momentum of SGD, or of AdamW's first average, in [0, 1)
    nesterov: bool = False  # use Nesterov's momentum
    weight_decay: float = 5e-4  # weight decay of kernels; biases and norms have none
    clip: float = 0.0  # highest norm of the gradient of all parameters; 0 = off
    label_smoothing: float = 0.0  # share of the target that is spread over all classes
    ema: float = 0.0  # decay of the parameter average (EMA) used for evaluation; 0 = off

    method: Method = "agip"  # pruning method, see docs/methods.md; none trains a dense network
    sparsity: float = 0.72  # fraction of prunable weights that are zero in the end, in [0, 1)
    prune_start: float = 0.1  # fraction of all steps at which sparsity starts to rise
    prune_stop: float = 0.6  # fraction of all steps at which sparsity is reached
    prune_every: int = 100  # steps between two mask updates
    prunable: Prunable = "default"  # the usual kernels, or those of 1x1 convolutions
    budget: Budget = "default"  # sparsity per layer: the method's rule, one global ranking, ...
    decay: float | None = 0.99  # agip: decay of the gradient average; None = use the momentum
    regrow: float = 0.0  # agip: fraction of kept weights that moves at the first mask update
    rate: Literal["none", "density", "statistic"] = "none"  # agip: what survivors' rates adapt to
    drop: float = 0.3  # set, rigl: fraction of kept weights that moves at the first mask update
    phase: float = 0.05  # acdc: length of a phase, as a fraction of all steps
    pattern: Pattern = "weights"  # weights pruned together: single, n:m, inputs x outputs, filters
    granularity: Literal["weights", "channels"] = "weights"  # channels: agip, magnitude, random
    compact: bool = False  # channels: remove masked channels while training
    switches: int = 4  # compact: highest number of switches to a smaller network
    saving: float = 0.2  # compact: fraction of a step that a switch must save at least
    switch_steps: float = 50.0  # compact: price of a switch, in steps of the dense network
    switch_delay: int = 10  # compact: steps in which the next network compiles in the background
    rewarm_steps: int = 0  # compact: steps in which the learning rate rises again after a switch
    teacher: float = 0.0  # compact: weight of the loss that compares with the wide network; 0 = off
    multiple: int = 0  # compact: round widths up to this multiple; 0 = 8, but heads are not rounded
    grow_from: float = 1.0  # channels: fraction of each group that the run begins with; 1 = off
    grow_at: float = 0.1  # fraction of all steps after which the other channels are added
    fine_sparsity: float = 0.0  # channels: fraction of what is left that is pruned as weights
    fine_start: float = 0.6  # fraction of all steps at which single weights start to go
    fine_stop: float = 0.85  # fraction of all steps at which `fine_sparsity` is reached
    kernels: Literal["off", "auto"] = "off"  # train.py on a CPU: sparse kernels where they pay
    init_images: int = 1024  # snip, grasp: training images to score with, as one batch

    mesh: str = ""  # device mesh such as data=4,fsdp=2; fsdp also splits parameters; empty = data
    coordinator: str = ""  # several processes: address of the first, such as 10.0.0.1:1234
    processes: int = 1  # with coordinator: number of processes
    process: int = 0  # with coordinator: number of this process, from 0
    host_timeout: int = 100  # seconds without a sign of life after which a process is lost

    workdir: str = ""  # folder of all outputs; empty = runs/ and a name made of the main options
    overwrite: bool = False  # delete the run that the workdir holds and start again
    eval_every: int = 200  # steps between two evaluations on the test images
    eval_batch_size: int = 512  # images per evaluation step
    save_every: int = 500  # steps between two checkpoints
    log_every: int = 50  # steps between two lines of metrics
    chunk: int = 0  # steps per call; 0 = 1 on CPU (convolutions in loops are slow there), else 50

    def __post_init__(self) -> None:
        """Checks every value; one error names all that are out of range."""
        kinds = get_type_hints(Config).items()
        choices = {name: get_args(kind) for name, kind in kinds if get_origin(kind) is Literal}
        bad = [
            f"`{name}` must be one of {', '.join(names)}; got {getattr(self, name)!r}"
            for name, names in choices.items()
            if getattr(self, name) not in names
        ]
        for name, (rule, holds) in _RANGES.items():
            value = getattr(self, name)
            if not holds(value):
                bad.append(f"`{name}` must be {rule}; got {value}")
        if self.granularity == "channels" and self.method not in _OF_CHANNELS:
            names = ", ".join(_OF_CHANNELS)
            bad.append(f"`method` must be one of {names} with channels; got {self.method!r}")
        if self.pattern != "weights" and (
            self.granularity == "channels" or self.method not in _PATTERNED
        ):
            names = " or ".join(_PATTERNED)
            bad.append(f"`pattern` {self.pattern} needs `granularity` weights and `method` {names}")
        if self.padding != "SAME" and not self.model.startswith("mobilenet"):
            bad.append(f"`padding` {self.padding} needs a mobilenet; got `model` {self.model!r}")
        if self.enlarge and self.dataset in ("imagenet2012", "text", "synthetic"):
            bad.append(f"`enlarge` is for digits and fashion_mnist; got `dataset` {self.dataset}")
        if self.train_images and self.dataset in ("imagenet2012", "text"):
            bad.append(f"`train_images` is for small data sets; got `dataset` {self.dataset}")
        if self.prunable == "pointwise" and self.granularity == "channels":
            bad.append("`prunable` pointwise needs `granularity` weights")
        if self.compact and (self.granularity != "channels" or self.method == "none"):
            bad.append("`compact` needs a method that prunes, and `granularity` channels")
        if self.teacher and not (self.compact and self.granularity == "channels"):
            bad.append(
                f"`teacher` {self.teacher} needs `granularity` channels and `compact`: the network "
                "before channels are removed is the teacher"
            )
        if self.fine_sparsity and (self.granularity != "channels" or self.method == "none"):
            bad.append("`fine_sparsity` needs a method that prunes, and `granularity` channels")
        if self.fine_sparsity and not self.prune_stop <= self.fine_start <= self.fine_stop:
            bad.append(
                f"`fine_start` must lie between `prune_stop` ({self.prune_stop}) and `fine_stop` "
                f"({self.fine_stop}), so that channels go first; got {self.fine_start}"
            )
        bad += self._bad_for_kernels() if self.kernels != "off" else []
        bad += self._bad_for_growth() if self.grow_from < 1 else []
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
                f"`switch_delay` must be less than `prune_every` ({self.prune_every}), as masks "
                f"must not change before the switch; got {self.switch_delay}"
            )
        is_text, is_decoder = self.dataset == "text", self.model.startswith("decoder")
        if is_text != is_decoder:
            bad.append(
                f"`model` must be a decoder for the data set text, and for no other; got "
                f"{self.model} for {self.dataset}"
            )
        if is_text and (self.pad or self.flip or self.small_images < 1):
            bad.append("`pad`, `flip` and `small_images` are for images, not for text")
        if is_text and self.method == "synflow":
            bad.append("`method` synflow feeds images of ones, which text has no equal of")
        if self.scan and not is_decoder:
            bad.append(f"`scan` needs a decoder; got {self.model}")
        if self.prune_stop < self.prune_start:
            bad.append(
                f"`prune_stop` must not be less than `prune_start` ({self.prune_start}); "
                f"got {self.prune_stop}"
            )
        if bad:
            raise ValueError("\n".join(bad))

    def _bad_for_kernels(self) -> list[str]:
        """Lists what does not go with sparse kernels."""
        rules = {
            f"`method` {', '.join(_WITH_KERNELS)}; got {self.method!r}": (
                self.method in _WITH_KERNELS
            ),
            "`granularity` weights; `compact` makes channels fast": self.granularity == "weights",
            f"`chunk` 0 or 1; got {self.chunk}": self.chunk <= 1,
            f"one process; got `processes` {self.processes}": self.processes == 1,
        }
        needs = [own for own, holds in rules.items() if not holds]
        return [f"`kernels` {self.kernels} needs {own}" for own in needs]

    def _bad_for_growth(self) -> list[str]:
        """Lists what does not go with a network that grows."""
        rules = {
            f"`method` none, because a run prunes or grows; got {self.method!r}": (
                self.method == "none"
            ),
            f"`granularity` channels, by which it grows; got {self.granularity!r}": (
                self.granularity == "channels"
            ),
        }
        needs = [own for own, holds in rules.items() if not holds]
        return [f"`grow_from` {self.grow_from} needs {own}" for own in needs]


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

# A byte-level model: AdamW and clipping as in GPT-3 (Brown et al.), cosine to 0.
_TEXT = Config(
    dataset="text",
    model="decoder_mini",
    length=128,
    steps=2000,
    batch_size=16,
    optimizer="adamw",
    learning_rate=3e-3,
    warmup_steps=100,
    weight_decay=0.1,
    clip=1.0,
    method="none",
    eval_batch_size=128,
    eval_every=500,
)

# As `models.default_widths("mobilenet_v1", 0.5)`; a test compares.
_HALF_MOBILENET = (
    '{"stem": 16, "blocks": [[32], [64], [64], [128], [128], [256], [256], [256], [256], [256],'
    " [256], [512], [512]]}"
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
    "fashion_mobilenet": (
        "MobileNetV1 of half width on enlarged Fashion-MNIST, pruned for browsers and phones.",
        Config(
            dataset="fashion_mnist",
            enlarge=56,
            model="mobilenet_v1",
            widths=_HALF_MOBILENET,
            padding="SYMMETRIC",
            prunable="pointwise",
            steps=800,
            batch_size=32,
            warmup_steps=50,
            weight_decay=1e-4,
            sparsity=0.9,
            prune_every=20,
            eval_every=800,
            eval_batch_size=500,
        ),
    ),
    "synthetic_resnet50": (
        "ResNet-50 on synthetic ImageNet-sized images: a benchmark.",
        Config(
            dataset="synthetic", model="resnet50", dtype="bfloat16", steps=200, eval_batch_size=128
        ),
    ),
    "imagenet_resnet50": (
        "ResNet-50 on ImageNet, dense: 90 epochs of batch 1024.",
        _IMAGENET,
    ),
    "imagenet_resnet50_agip": (
        "The same with AGIP: 72 % of the weights are pruned between 10 % and 60 % of the steps.",
        dataclasses.replace(_IMAGENET, method="agip"),
    ),
    "imagenet_resnet50_rewind": (
        "The same for scripts/rewind.py: a step schedule, retrained at the early learning rate.",
        dataclasses.replace(_IMAGENET, schedule="steps", ema=0.0),
    ),
    "text_mini": (
        "A decoder of 0.87 M parameters on the bytes of --source-dir: minutes on a CPU.",
        _TEXT,
    ),
    "text_124m": (
        "A decoder of 124 M parameters on the bytes of --source-dir: for accelerators.",
        dataclasses.replace(
            _TEXT,
            model="decoder_124m",
            scan=True,
            remat=True,
            dtype="bfloat16",
            length=1024,
            steps=20_000,
            batch_size=256,
            learning_rate=6e-4,
            warmup_steps=1000,
            method="agip",
            sparsity=0.8,
            eval_batch_size=256,
            eval_every=2000,
        ),
    ),
}
