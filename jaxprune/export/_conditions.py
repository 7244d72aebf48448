"""Says whether XNNPACK runs a .tflite with sparse inference, and what prevents it.

XNNPACK, the engine of LiteRT on phones and in browsers, computes 1x1 convolutions from sparse
weights only if a whole part of the network can be kept in a layout of channel planes. If one
condition fails it runs everything dense and says nothing. The conditions here are those of
`xnn_subgraph_rewrite_for_nchw` in its src/subgraph.c.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.export._tflite import Network

_UNARY = {
    "ABS", "CEIL", "COS", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOG",
    "LOGISTIC", "NEG", "RELU", "RELU6", "RELU_0_TO_1", "RELU_N1_TO_1", "ROUND", "RSQRT", "SIN",
    "SQRT", "SQUARE", "TANH",
}  # fmt: skip
_BINARY = {"ADD", "MUL"}
_ENDS = {"MEAN", "SUM", "DEPTH_TO_SPACE"}
_UNPACKING = {"DENSIFY", "DEQUANTIZE"}
_STEM = "begin with a 3x3 convolution of stride 2 over 3 channels, padded by ((1, 1), (1, 1))"


class SparseReport(NamedTuple):
    """Whether a network runs with sparse inference; printed, it is two lines at most.

    Example:
        >>> print(SparseReport(False, "3 MAX_POOL_2D", "a pool", "use strides", 0, 0, 1))
        Sparse inference: no; operation 3 MAX_POOL_2D: a pool.
        Cure: use strides.
    """

    runs: bool
    operation: str  # the first that prevents it: number, kind, shape and name of its result; or ""
    reason: str
    cure: str
    zeros: (
        float  # fraction of zeros among the weights that XNNPACK counts; NaN if it gets not there
    )
    weights: int  # how many these are
    sparse_tensors: int  # filters that are stored sparse

    def __str__(self) -> str:
        """Says yes, or the operation, the reason and the cure."""
        if self.runs:
            return (
                f"Sparse inference: yes; {self.zeros:.1%} of {self.weights:,} weights of 1x1 "
                "convolutions are 0. (XNNPACK has it on ARM and in browsers, not on x86 with AVX.)"
            )
        at = f"operation {self.operation}: " if self.operation else ""
        return f"Sparse inference: no; {at}{self.reason}.\nCure: {self.cure}."


class _Obstacle(NamedTuple):
    reason: str
    cure: str


def sparse_report(path: str | os.PathLike[str]) -> SparseReport:
    """Says whether a .tflite file runs with sparse inference on phones and in browsers.

    The file is read, not run, so the answer is the same on every machine. It holds for float32
    computation in XNNPACK, on processors for which it has sparse kernels (ARM, WebAssembly).

    Args:
        path: the file, from `export.litert` or from anywhere else.

    Returns:
        A `SparseReport`, with the first operation that prevents sparse inference and the cure.

    Raises:
        ValueError: if the file is no .tflite file, or damaged.
        OSError: if it cannot be read.
        ModuleNotFoundError: if the extra `litert` is not installed.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jaxprune import export
        >>> path = tempfile.mkdtemp() + "/double.tflite"
        >>> _ = export.litert(lambda w, x: x * w, jnp.float32(2), jnp.ones((1, 3)), path)
        >>> print(sparse_report(path))
        Sparse inference: no; no filter is stored as a sparse tensor.
        Cure: write it with ...

    References:
        Elsen, Dukhan, Gale, Simonyan. Fast Sparse ConvNets. arXiv:1911.09723.
    """
    content = Path(path).read_bytes()
    try:
        network = Network(content, "export.sparse_report")
    except ValueError as error:
        raise ValueError(f"`path` {path} cannot be read: {error}") from error
    try:
        return report_of(network)
    except Exception as error:  # options and shapes that no operation has
        raise ValueError(
            f"`path` {path} cannot be read: it is damaged ({type(error).__name__}: {error})"
        ) from error


def report_of(network: Network) -> SparseReport:
    """Returns the report of a network in memory."""
    return _Walk(network).report()


class _Walk:
    """One walk over the operations of a network, from the stem to the global average."""

    def __init__(self, network: Network):
        self.network = network
        self.operations = network.graph.operators
        self.kinds = [network.kind(op) for op in self.operations]
        self.producer = {
            int(out): own for own, op in enumerate(self.operations) for out in op.outputs
        }
        self.static = self._static()
        self.sparse = sum(tensor.sparsity is not None for tensor in network.graph.tensors)
        self.inside: set[int] = set()  # tensors in the layout of planes
        self.ends: set[int] = set()  # those that may leave it
        self.counted: dict[int, tuple[int, int]] = {}  # operation -> weights, and those not 0

    def report(self) -> SparseReport:
        """Walks, and reports the first obstacle."""
        if not self.sparse:
            return self._no(
                -1,
                _Obstacle(
                    "no filter is stored as a sparse tensor",
                    "write it with `export.litert(...)` from variables with at least 70 % zeros in "
                    "1x1 convolutions",
                ),
            )
        stems = [index for index in range(len(self.kinds)) if self._is_stem(index)]
        if not stems:
            return self._no(*self._why_no_stem())
        for index in range(len(self.kinds)):
            obstacle = self._visit(index, index in stems)
            if obstacle is not None:
                return self._no(index, obstacle)
        for out in map(int, self.network.graph.outputs):
            if out in self.inside and out not in self.ends:
                obstacle = _Obstacle(
                    "its result is an output of the network",
                    "return only what comes after the global average",
                )
                return self._no(self.producer[out], obstacle)
        if not self.ends:
            return self._no(
                max(self.producer[own] for own in self.inside),
                _Obstacle(
                    "no global average follows the convolutions",
                    "end them with a mean over height and width",
                ),
            )
        return self._count()

    def _count(self) -> SparseReport:
        """Reports whether more than two thirds of the weights are 0."""
        kept = {index: own for index, (_, own) in self.counted.items()}
        total = sum(size for size, _ in self.counted.values())
        if (total - sum(kept.values())) * 3 > total * 2:
            return SparseReport(
                True, "", "", "", 1 - sum(kept.values()) / total, total, self.sparse
            )
        if not total:
            last = max(self.producer[own] for own in self.inside)
            return self._no(last, _Obstacle("no 1x1 convolution comes before it", _STEM))
        most = max(kept, key=lambda index: kept[index])
        is_head = self.kinds[most] == "FULLY_CONNECTED"
        cure = (
            "write the file with `export.litert`, which puts a RESHAPE before the dense layer, or "
            "prune that layer as well"
            if is_head
            else "prune 1x1 convolutions to 70 % or more"
        )
        share = 1 - sum(kept.values()) / total
        return self._no(
            most,
            _Obstacle(
                f"only {share:.1%} of the {total:,} weights of 1x1 convolutions and dense layers "
                f"are 0, of which more than 2/3 must be; most others ({kept[most]:,}) are here",
                cure,
            ),
            share,
            total,
        )

    def _no(
        self, index: int, obstacle: _Obstacle, share: float = float("nan"), total: int = 0
    ) -> SparseReport:
        text = ""
        if index >= 0:
            out = int(self.operations[index].outputs[0])
            shape = list(self.network.shape(out))
            text = f"{index} {self.kinds[index]} {shape} {self.network.name(out)}".strip()
        return SparseReport(False, text, obstacle.reason, obstacle.cure, share, total, self.sparse)

    def _static(self) -> dict[int, int]:
        """Maps each constant to the tensor that stores it: itself, or what is unpacked to it."""
        tensors = range(len(self.network.graph.tensors))
        found = {index: index for index in tensors if self.network.is_constant(index)}
        for kind, op in zip(self.kinds, self.operations):
            if kind in _UNPACKING and int(op.inputs[0]) in found:
                found[int(op.outputs[0])] = found[int(op.inputs[0])]
        return found

    def _weights(self, index: int) -> tuple[int, int]:
        """Returns how many weights a filter has and how many are not 0."""
        size, stored = math.prod(self.network.shape(index)), self.static.get(index)
        if stored is None:
            return size, size
        if self.network.graph.tensors[stored].sparsity is not None:
            return size, int(np.count_nonzero(self.network.entries(stored)))
        values = self.network.values(stored)
        return size, size if values is None else int(np.count_nonzero(values))

    def _visit(self, index: int, is_stem: bool) -> _Obstacle | None:
        """Takes one operation into the layout of planes, or says why that is impossible."""
        op, kind = self.operations[index], self.kinds[index]
        inputs = [int(own) for own in op.inputs if own >= 0 and int(own) not in self.static]
        outputs = [int(own) for own in op.outputs]
        if is_stem:
            self.inside.update(outputs)
            return self._not_float(op)
        if not self.inside.intersection(inputs):
            return None
        obstacle = self._not_float(op) or self._obstacle(index)
        if obstacle is not None:
            if self.ends.issuperset(inputs) and self._leaves(inputs):
                return None
            return obstacle
        outside = [own for own in inputs if own not in self.inside]
        if outside:
            name = self.network.name(outside[0])
            return _Obstacle(
                f"it also reads {name or 'a value'}, which does not come from the stem",
                "let all branches begin at the stem",
            )
        self.inside.update(outputs)
        if kind in _ENDS or kind == "FULLY_CONNECTED":
            self.ends.update(outputs)
        if kind in ("CONV_2D", "FULLY_CONNECTED"):
            self.counted[index] = self._weights(int(op.inputs[1]))
        return None

    def _leaves(self, tensors: list[int]) -> bool:
        """Tells whether everything that reads some tensors is outside of the layout."""
        readers = [own for own, op in enumerate(self.operations) if set(tensors) & set(op.inputs)]
        return all(self._obstacle(own) is not None for own in readers)

    def _not_float(self, op: Any) -> _Obstacle | None:
        used = [int(own) for own in (*op.inputs, *op.outputs) if own >= 0]
        data = [own for own in used if own not in self.static]
        if all(map(self.network.is_float32, data)):
            return None
        return _Obstacle(
            "it does not compute in float32", 'convert with float32 inputs; `values="int8"` is fine'
        )

    def _is_stem(self, index: int) -> bool:
        return self.kinds[index] == "CONV_2D" and not self._stem_obstacles(index)

    def _why_no_stem(self) -> tuple[int, _Obstacle]:
        """Returns the first convolution that reads images and what is wrong with it."""
        for index, kind in enumerate(self.kinds):
            if kind == "CONV_2D":
                return index, self._stem_obstacles(index)[0]
            if kind == "DEPTHWISE_CONV_2D":
                # The converter writes a convolution of one channel as a depthwise one.
                channels = self.network.shape(int(self.operations[index].inputs[0]))[-1]
                if channels != 1:
                    return index, _Obstacle("it is the first convolution", _STEM)
                return index, _Obstacle(
                    "its input has 1 channel, not 3",
                    "repeat grey images along the channels: `jnp.repeat(images, 3, axis=-1)`",
                )
        return -1, _Obstacle("it has no convolution", _STEM)

    def _stem_obstacles(self, index: int) -> list[_Obstacle]:
        """Returns what keeps a convolution from being the first one in the layout of planes."""
        op = self.operations[index]
        window, stride, groups, dilation = self._window(op)
        channels = self.network.shape(int(op.inputs[1]))[-1]
        rules: list[tuple[bool, str, str]] = [
            (window == (3, 3), f"its window is {window[0]}x{window[1]}, not 3x3", _STEM),
            (
                channels == 3 and groups == 1,
                f"its input has {channels * groups} channels in {groups} groups, not 3 in 1",
                "repeat grey images along the channels, or drop those beyond three",
            ),
            (stride == (2, 2), f"its stride is {stride[0]}, not 2", _STEM),
            (dilation == (1, 1), "it has a dilation", _STEM),
            *self._padding_rule(index, 1),
        ]
        return [_Obstacle(reason, cure) for holds, reason, cure in rules if not holds]

    def _padding_rule(self, index: int, wanted: int) -> list[tuple[bool, str, str]]:
        found = self._padding(index)
        text = "SAME with stride 2, which pads one side only" if found is None else f"{found}"
        pair = (wanted, wanted)
        cure = f"pad explicitly by ({pair}, {pair}) instead of SAME"
        return [(found == (wanted,) * 4, f"its padding is {text}, not {pair} on each axis", cure)]

    def _window(self, op: Any) -> tuple[tuple[int, int], tuple[int, int], int, tuple[int, int]]:
        """Returns window, stride, groups and dilation of a convolution."""
        shape, options = self.network.shape(int(op.inputs[1])), op.builtinOptions
        data = self.network.shape(int(op.inputs[0]))
        groups = data[-1] // shape[-1] if shape[-1] else 0
        stride = (options.strideH, options.strideW)
        return (
            (shape[1], shape[2]),
            stride,
            groups,
            (options.dilationHFactor, options.dilationWFactor),
        )

    def _padding(self, index: int) -> tuple[int, ...] | None:
        """Returns the padding (top, bottom, left, right); None for one that XNNPACK leaves open."""
        op = self.operations[index]
        window, stride, _, _ = self._window(op)
        before = self.producer.get(int(op.inputs[0]), -1)
        extra = np.zeros((4, 2), int)
        if before >= 0 and self.kinds[before] == "PAD":
            known = self.network.values(int(self.operations[before].inputs[1]))
            extra = extra if known is None else known
        sides = tuple(int(own) for own in extra[1:3].reshape(-1))
        if op.builtinOptions.padding == self.network.schema.Padding.VALID:
            return sides
        if max(stride) > 1:
            return None
        total = [size - 1 for size in window]
        own = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
        return tuple(left + right for left, right in zip(own, sides))

    def _obstacle(self, index: int) -> _Obstacle | None:
        """Returns why an operation cannot be part of the layout of planes."""
        kind = self.kinds[index]
        rule = _RULES.get(kind)
        if rule is None and kind not in _UNARY:
            return _Obstacle(
                f"{kind} ends the layout that sparse inference needs",
                "use only 1x1 and depthwise convolutions, sums, products and activations between "
                "the stem and the global average",
            )
        if rule is None:
            rule = _rank_4
        bad = [_Obstacle(reason, cure) for holds, reason, cure in rule(self, index) if not holds]
        return bad[0] if bad else None


_Rules = list[tuple[bool, str, str]]
_POINTWISE = "only 1x1 convolutions and depthwise ones can follow the stem"


def _rank_4(walk: _Walk, index: int) -> _Rules:
    rank = len(walk.network.shape(int(walk.operations[index].inputs[0])))
    return [(rank == 4, f"its input has {rank} dimensions, not 4", "keep all four dimensions")]


def _convolution(walk: _Walk, index: int) -> _Rules:
    window, stride, groups, dilation = walk._window(walk.operations[index])
    split = "make it a 1x1 convolution, or a depthwise one and a 1x1 one"
    return [
        (window == (1, 1), f"its window is {window[0]}x{window[1]}; {_POINTWISE}", split),
        (groups == 1, f"it has {groups} groups", "use one group"),
        (stride == (1, 1), f"its stride is {stride[0]}", "move the stride to a depthwise one"),
        (dilation == (1, 1), "it has a dilation", "use none"),
        (walk._padding(index) == (0,) * 4, "a 1x1 convolution is padded", "use no padding"),
    ]


def _depthwise(walk: _Walk, index: int) -> _Rules:
    op = walk.operations[index]
    window, stride, _, dilation = walk._window(op)
    channels = walk.network.shape(int(op.inputs[0]))[-1]
    outputs = walk.network.shape(int(op.inputs[1]))[-1]
    return [
        (window in ((3, 3), (5, 5)), f"its window is {window}, not 3x3 or 5x5", "use one of these"),
        (outputs == channels, "it has several outputs for each channel", "use one"),
        (stride in ((1, 1), (2, 2)), f"its stride is {stride}, not 1 or 2", "use one of these"),
        (dilation == (1, 1), "it has a dilation", "use none"),
        *walk._padding_rule(index, window[0] // 2),
    ]


def _pair(walk: _Walk, index: int) -> _Rules:
    op = walk.operations[index]
    shapes = [walk.network.shape(int(own)) for own in op.inputs]
    data = [shape for own, shape in zip(op.inputs, shapes) if int(own) not in walk.static]
    ranks = [len(shape) for shape in shapes]
    excited = len({shape[1:3] for shape in data}) == 1
    return [
        (
            excited,
            f"it joins arrays of {' and '.join(map(str, data))}, as squeeze-and-excite does",
            "use blocks without squeeze-and-excite",
        ),
        (
            ranks == [4, 4],
            f"its inputs have {ranks[0]} and {ranks[1]} dimensions, not 4",
            "fold numbers that are added or multiplied into a layer, or give them 4 dimensions",
        ),
    ]


def _pad(walk: _Walk, index: int) -> _Rules:
    readers = [
        own
        for own, op in enumerate(walk.operations)
        if int(walk.operations[index].outputs[0]) in op.inputs
    ]
    joins = len(readers) == 1 and walk.kinds[readers[0]] in ("CONV_2D", "DEPTHWISE_CONV_2D")
    return [(joins, "no single convolution follows the padding", "pad in the convolution itself")]


def _resize(walk: _Walk, index: int) -> _Rules:
    shape = walk.network.shape(int(walk.operations[index].inputs[0]))
    return [(min(shape[1:3]) > 1, "it enlarges a single pixel", "leave it out")]


_RULES: dict[str, Callable[[_Walk, int], _Rules]] = {
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "FULLY_CONNECTED": lambda walk, index: [],
    "DEPTH_TO_SPACE": lambda walk, index: [],
    "MEAN": _rank_4,
    "SUM": _rank_4,
    "RESIZE_BILINEAR": _resize,
    "PAD": _pad,
    **dict.fromkeys(_BINARY, _pair),
}
