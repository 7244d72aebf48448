"""How much faster sparse kernels are than dense ones on this machine, measured once.

Masks are those of single weights. Layers that keep blocks of 16 outputs are predicted from these:
their forward pass is as fast or up to 2.3 times as fast. All three passes were 1.1 to 1.6 times as
fast in 12 of 13 layers, and 0.8 times in one of 64 rows, 1,024 inputs and 1,024 outputs.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import files
from jaxprune.files import schemas
from jaxprune.kernels import _operations as operations
from jaxprune.kernels._building import user_cache

__all__ = ["Case", "Entry", "Ratio", "Table", "expected_ratio", "measure_table", "saved_table"]

VERSION = 1
DENSITIES = 0.05, 0.1, 0.2, 0.35
_TURNS = 7


class Case(NamedTuple):
    """A class of layers, of which one is measured.

    Example:
        >>> Case("product", rows=1024, inputs=256, outputs=256).image
        0
    """

    kind: str  # "product" or "convolution"
    rows: int  # outputs for each output channel: examples times positions
    inputs: int  # inputs of a product; of a convolution channels times positions of the window
    outputs: int
    stride: int = 1
    image: int = 0  # of a convolution of 3x3: height and width of its square images


CASES = (
    *(
        Case("product", rows, width, width)
        for rows, width in ((64, 256), (64, 1024), (1024, 256), (1024, 1024), (16384, 64))
    ),
    *(
        Case("convolution", 64 * (image // stride) ** 2, 9 * width, width, stride, image)
        for image, width, stride in ((28, 16, 1), (14, 32, 1), (8, 64, 1), (28, 16, 2), (14, 64, 2))
    ),
)


class Ratio(NamedTuple):
    """The time of the masked dense operation, divided by that of the sparse one.

    Example:
        >>> Ratio(forward=1.4, training=2.0).training
        2.0
    """

    forward: float  # of the result alone
    training: float  # of the result and the gradients of both operands


# (class of layers, density) -> Ratio
Clock = Callable[[Case, float], Ratio]


class Entry(NamedTuple):
    """The ratios of one class of layers.

    Example:
        >>> entry = Entry(CASES[0], (0.1, 0.2), (Ratio(2.0, 3.0), Ratio(1.0, 1.5)))
        >>> round(entry.at(0.1).training, 6)
        3.0
    """

    case: Case
    densities: tuple[float, ...]  # ascending
    ratios: tuple[Ratio, ...]

    def at(self, density: float) -> Ratio:
        """Returns the ratios at a density, between and beyond those measured.

        Logarithms are interpolated; denser than measured, the last slope continues, and sparser
        than measured, the first ratio holds.
        """
        x = np.log(self.densities)
        at = math.log(max(density, self.densities[0]))
        found = []
        for values in zip(*self.ratios, strict=True):
            y = np.log(values)
            value = float(np.interp(at, x, y))
            if len(x) > 1 and at > x[-1]:
                slope = min(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2]))
                value = float(y[-1] + slope * (at - x[-1]))
            found.append(math.exp(value))
        return Ratio(*found)


class Table(NamedTuple):
    """The ratios of all classes of layers on one machine, from `measure_table`.

    Example:
        >>> Table({}, ()).entries
        ()
    """

    machine: dict[str, Any]  # see `describe_machine`
    entries: tuple[Entry, ...]

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON; `load_table` reads it."""
        entries = [
            {
                "case": entry.case._asdict(),
                "densities": list(entry.densities),
                "forward": [ratio.forward for ratio in entry.ratios],
                "training": [ratio.training for ratio in entry.ratios],
            }
            for entry in self.entries
        ]
        content = {"version": VERSION, "machine": self.machine, "entries": entries}
        with files.replacing(path) as file:
            file.write(json.dumps(files.seal(content)) + "\n")


_ABOVE_0 = schemas.each(schemas.finite)
_SCHEMA = schemas.record(
    {
        "version": schemas.one_of(VERSION),
        "machine": schemas.table(schemas.anything),
        "entries": schemas.each(
            schemas.record(
                {
                    "case": schemas.record(
                        {"kind": schemas.one_of("product", "convolution")}
                        | {name: schemas.whole() for name in Case._fields[1:]}
                    ),
                    "densities": _ABOVE_0,
                    "forward": _ABOVE_0,
                    "training": _ABOVE_0,
                }
            )
        ),
    }
)


def measure_table(
    cases: Sequence[Case] = CASES,
    densities: Sequence[float] = DENSITIES,
    *,
    clock: Clock | None = None,
) -> Table:
    """Measures sparse against masked dense operations on this machine.

    Both run in turns, and the seconds are those that processors spend on this process, so that
    other work on the machine does not count. It takes about a minute, most of it compilation.

    Args:
        cases: classes of layers; their widths are those of one layer of the class.
        densities: fractions of weights that are kept.
        clock: function `(case, density) -> Ratio`. Default: processor seconds, the least of seven
            turns.

    Returns:
        The `Table`.

    Raises:
        ValueError: if there is no case or no density, or a density is not in (0, 1].

    Example:
        >>> table = measure_table(clock=lambda case, density: Ratio(0.2 / density, 0.3 / density))
        >>> round(expected_ratio(table, Case("product", 512, 300, 300), 0.1).training, 6)
        3.0
    """
    if not cases or not densities or not all(0 < own <= 1 for own in densities):
        raise ValueError(
            "`cases` and `densities` must not be empty, and densities must be in (0, 1]; got "
            f"{len(cases)} cases and the densities {tuple(densities)}"
        )
    clock = time_case if clock is None else clock
    ordered = tuple(sorted(densities))
    entries = [Entry(case, ordered, tuple(clock(case, own) for own in ordered)) for case in cases]
    return Table(describe_machine(), tuple(entries))


def expected_ratio(table: Table, case: Case, density: float) -> Ratio:
    """Returns how much faster the sparse kernel of a layer is expected to be.

    The class of the same kind and stride with the most similar sizes decides.

    Args:
        table: from `measure_table`.
        case: the layer.
        density: fraction of its weights that is kept.

    Returns:
        A `Ratio`: 2.0 is twice as fast as the masked dense operation. 0 if the table has no class
        of this kind and stride.

    Example:
        >>> table = measure_table(clock=lambda case, density: Ratio(1.0, 1 / density))
        >>> layer = Case("convolution", rows=4096, inputs=144, outputs=16)
        >>> round(expected_ratio(table, layer, 0.25).training, 6)
        4.0
    """

    def distance(entry: Entry) -> float:
        own = entry.case
        pairs = (own.rows, case.rows), (own.inputs, case.inputs), (own.outputs, case.outputs)
        return sum(math.log(max(1, a) / max(1, b)) ** 2 for a, b in pairs)

    alike = [e for e in table.entries if (e.case.kind, e.case.stride) == (case.kind, case.stride)]
    if not alike or density <= 0:
        return Ratio(0.0, 0.0)
    return min(alike, key=distance).at(density)


def time_case(case: Case, density: float) -> Ratio:
    """Times one layer, dense and sparse in turns.

    Args:
        case: the layer.
        density: fraction of its weights that is kept.

    Returns:
        The ratios.

    Example:
        >>> time_case(Case("product", 8, 8, 8), 0.5).forward > 0
        True
    """
    rng = np.random.default_rng(0)
    if case.kind == "product":
        shape, image = (case.inputs, case.outputs), (case.rows, case.inputs)
    else:
        channels, side = case.inputs // 9, case.image
        batch = max(1, case.rows * case.stride**2 // side**2)
        shape, image = (3, 3, channels, case.outputs), (batch, side, side, channels)
    mask = rng.random(shape) < density
    x = jnp.asarray(rng.normal(size=image), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=shape) * mask, jnp.float32)
    make: Any = (
        operations.product_indices if case.kind == "product" else operations.convolution_indices
    )
    indices: Any = make(mask)
    strides, padding = (case.stride,) * 2, ((1, 1), (1, 1))

    def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if case.kind == "product":
            return x @ kernel
        numbers = "NHWC", "HWIO", "NHWC"
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

    def sparse(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if case.kind == "product":
            return operations.sparse_product(x, kernel, indices)
        return operations.sparse_convolution(x, kernel, indices, strides=strides, padding=padding)

    def training(run: Callable[..., jax.Array]) -> Callable[..., Any]:
        def call(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> Any:
            y, back = jax.vjp(run, x, kernel)
            return y, back(cotangent)

        return call

    cotangent = jnp.ones(jax.eval_shape(dense, x, kernel).shape)
    return Ratio(
        _ratio(jax.jit(dense), jax.jit(sparse), x, kernel),
        _ratio(jax.jit(training(dense)), jax.jit(training(sparse)), x, kernel, cotangent),
    )


def _ratio(dense: Callable[..., Any], sparse: Callable[..., Any], *args: Any) -> float:
    """Returns the ratio of the shortest times of two functions that ran in turns.

    The seconds are those of all threads of this process. On a machine with other work, the wall
    clock also counts how long threads wait for a core: it made 52 of 4.4 for one convolution.
    """

    def seconds(function: Callable[..., Any]) -> float:
        began = time.process_time()
        jax.block_until_ready(function(*args))
        return time.process_time() - began

    for function in (dense, sparse):  # the first call compiles
        seconds(function)
    turns = [(seconds(dense), seconds(sparse)) for _ in range(_TURNS)]
    of_dense, of_sparse = map(min, zip(*turns, strict=True))
    return of_dense / max(of_sparse, 1e-9)


def describe_machine() -> dict[str, Any]:
    """Describes what a table holds for: the processor and the versions.

    Returns:
        JSON-ready values.

    Example:
        >>> sorted(describe_machine())
        ['cores', 'jax', 'jaxlib', 'platform', 'processor']
    """
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(errors="replace").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "platform": jax.default_backend(),
        "processor": processor,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
    }


def load_table(path: str | Path) -> Table:
    """Reads a table of this machine.

    Args:
        path: a file written by `Table.save`.

    Returns:
        The `Table`.

    Raises:
        ValueError: if the file is damaged, or holds for a different machine or other versions.
        OSError: if it cannot be read.

    Example:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/table.json"
        >>> measure_table(clock=lambda case, density: Ratio(1.0, 2.0)).save(file)
        >>> load_table(file).entries[0].at(0.1).training
        2.0
    """
    content = files.unseal(files.parse_json(Path(path).read_bytes()), str(path))
    _SCHEMA(content, str(path))
    if content["machine"] != describe_machine():
        raise ValueError(f"{path} was measured on a different machine, or with other versions")
    entries = []
    for own in content["entries"]:
        columns = own["densities"], own["forward"], own["training"]
        if len({*map(len, columns)}) != 1 or not columns[0] or min(map(min, columns)) <= 0:
            raise ValueError(f"{path}: each class must have one ratio above 0 for each density")
        ratios = tuple(Ratio(*pair) for pair in zip(*columns[1:], strict=True))
        entries.append(Entry(Case(**own["case"]), tuple(columns[0]), ratios))
    return Table(content["machine"], tuple(entries))


def saved_table(folder: str | Path | None = None, *, clock: Clock | None = None) -> Table:
    """Returns the table of this machine: the saved one, or one that is measured and saved.

    A file that is damaged, or of a different machine or other versions, is measured again.

    Args:
        folder: where the file is; None: see `user_cache`.
        clock: see `measure_table`.

    Returns:
        The `Table`.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> table = saved_table(folder, clock=lambda case, density: Ratio(1.0, 2.0))
        >>> saved_table(folder) == table
        True
    """
    path = Path(user_cache() if folder is None else folder) / "kernels.json"
    try:
        return load_table(path)
    except (OSError, ValueError):
        table = measure_table(clock=clock)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path)
    except OSError:  # a read-only home: measured again in the next process
        pass
    return table
