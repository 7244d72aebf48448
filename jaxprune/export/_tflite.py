"""Reads, edits and writes the flatbuffer of a .tflite file."""

import copy
import math
from typing import Any

import numpy as np

from jaxprune.export._packages import load

_IDENTIFIER = b"TFL3"


class Network:
    """A .tflite file in memory: tensors, constants, and operations in the order of execution.

    Args:
        content: the bytes of the file.
        user: the function that reads it, for errors.

    Raises:
        ValueError: if the bytes are no .tflite file, or a damaged one.
        ModuleNotFoundError: if the extra `litert` is not installed.

    Example:
        >>> Network(b"not a flatbuffer", "export.sparse_report")
        Traceback (most recent call last):
        ValueError: it is no .tflite file: it lacks the identifier TFL3
    """

    def __init__(self, content: bytes, user: str):
        self.schema = load("ai_edge_litert.schema_py_generated", "litert", user)
        self._builder = _sharing(load("flatbuffers", "litert", user).Builder)
        if content[4:8] != _IDENTIFIER:
            raise ValueError("it is no .tflite file: it lacks the identifier TFL3")
        try:
            self.model = self.schema.ModelT.InitFromObj(self.schema.Model.GetRootAs(content, 0))
        except Exception as error:  # offsets of damaged bytes lead anywhere
            raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error
        self._check()

    def _check(self) -> None:
        """Raises unless all indices exist and every constant has the bytes of its shape."""
        model = self.model
        if len(model.subgraphs or []) != 1 or not model.buffers or model.operatorCodes is None:
            raise ValueError(f"it must hold one graph, but holds {len(model.subgraphs or [])}")
        for name in ("tensors", "operators", "inputs", "outputs"):
            if getattr(self.graph, name) is None:
                raise ValueError(f"it is damaged: its graph has no {name}")
        count = len(self.graph.tensors)
        for index, tensor in enumerate(self.graph.tensors):
            if not 0 <= tensor.buffer < len(model.buffers):
                raise ValueError(f"it is damaged: tensor {index} has no buffer")
            shape = self.shape(index)
            size = math.prod(shape)
            if min(shape, default=0) < 0 or size > 2**40:
                raise ValueError(f"it is damaged: tensor {index} has the shape {list(shape)}")
            data, width = self._data(tensor), self._width(tensor)
            if data is not None and width and tensor.sparsity is None and len(data) != size * width:
                raise ValueError(
                    f"it is damaged: tensor {index} of shape {list(shape)} has {len(data)} bytes"
                )
        used = [self.graph.inputs, self.graph.outputs]
        for index, op in enumerate(self.graph.operators):
            if not 0 <= op.opcodeIndex < len(model.operatorCodes) or op.outputs is None:
                raise ValueError(f"it is damaged: operation {index} has no kind or no output")
            used += [[] if op.inputs is None else op.inputs, op.outputs]
        if any(not -1 <= int(index) < count for indices in used for index in indices):
            raise ValueError(f"it is damaged: an operation uses a tensor beyond {count}")

    @property
    def graph(self) -> Any:
        """The one graph."""
        return self.model.subgraphs[0]

    def kind(self, op: Any) -> str:
        """Returns the kind of an operation, such as "CONV_2D"."""
        code = self.model.operatorCodes[op.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        names = {own: name for name, own in vars(self.schema.BuiltinOperator).items()}
        return names.get(number, f"operation {number}")

    def shape(self, index: int) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        shape = self.graph.tensors[index].shape
        return () if shape is None else tuple(int(size) for size in shape)

    def name(self, index: int) -> str:
        """Returns the last part of the name of a tensor, which says where in JAX it comes from."""
        text = (self.graph.tensors[index].name or b"").decode(errors="replace")
        return text.split(";")[0]

    def is_float32(self, index: int) -> bool:
        """Tells whether a tensor holds float32."""
        return self.graph.tensors[index].type == self.schema.TensorType.FLOAT32

    def values(self, index: int) -> np.ndarray | None:
        """Returns the values of a dense constant; None for all other tensors."""
        tensor = self.graph.tensors[index]
        data, dtype = self._data(tensor), self._dtype(tensor)
        if data is None or dtype is None or tensor.sparsity is not None:
            return None
        return np.frombuffer(bytes(data), dtype).reshape(self.shape(index))

    def entries(self, index: int) -> np.ndarray:
        """Returns the stored entries of a sparse constant, in order."""
        tensor = self.graph.tensors[index]
        dtype = self._dtype(tensor)
        return np.frombuffer(bytes(self._data(tensor)), np.uint8 if dtype is None else dtype)

    def is_constant(self, index: int) -> bool:
        """Tells whether a tensor is stored in the file."""
        return self._data(self.graph.tensors[index]) is not None

    def _data(self, tensor: Any) -> Any:
        return self.model.buffers[tensor.buffer].data

    def _dtype(self, tensor: Any) -> np.dtype | None:
        names = {own: name.lower() for name, own in vars(self.schema.TensorType).items()}
        name = names.get(tensor.type, "")
        return np.dtype(name) if name in ("float32", "float16", "int8", "int32", "int64") else None

    def _width(self, tensor: Any) -> int:
        dtype = self._dtype(tensor)
        return 0 if dtype is None else dtype.itemsize

    def add_tensor(self, like: int, prefix: str, shape: tuple[int, ...] | None = None) -> int:
        """Adds a tensor without values, of the type of another one; returns its index."""
        tensor = copy.copy(self.graph.tensors[like])
        tensor.name = prefix.encode() + (tensor.name or b"")
        tensor.buffer, tensor.sparsity, tensor.shapeSignature = 0, None, None
        if shape is not None:
            tensor.shape = np.array(shape, np.int32)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def add_constant(self, name: str, values: np.ndarray) -> int:
        """Adds an int32 constant; returns its index."""
        tensor = self.schema.TensorT()
        tensor.name, tensor.type = name.encode(), self.schema.TensorType.INT32
        tensor.shape = np.array(values.shape, np.int32)
        self.graph.tensors.append(tensor)
        index = len(self.graph.tensors) - 1
        self.store(index, values.astype(np.int32))
        return index

    def store(self, index: int, values: np.ndarray) -> None:
        """Gives a tensor a buffer with these values."""
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        self.graph.tensors[index].buffer = len(self.model.buffers) - 1

    def operation(self, kind: str, inputs: list[int], outputs: list[int], version: int = 1) -> Any:
        """Makes an operation that is not yet part of the graph."""
        number = getattr(self.schema.BuiltinOperator, kind)
        codes = self.model.operatorCodes
        found = [
            index
            for index, code in enumerate(codes)
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number
        ]
        if not found:
            code = self.schema.OperatorCodeT()
            code.builtinCode, code.version = number, version
            code.deprecatedBuiltinCode = min(number, 127)
            codes.append(code)
        op = self.schema.OperatorT()
        op.opcodeIndex = found[0] if found else len(codes) - 1
        code = codes[op.opcodeIndex]
        code.version = max(code.version, version)
        op.inputs, op.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        return op

    def set_options(self, op: Any, name: str, **options: Any) -> None:
        """Sets the options of an operation, such as those named "DensifyOptions"."""
        op.builtinOptionsType = getattr(self.schema.BuiltinOptions, name)
        op.builtinOptions = getattr(self.schema, name + "T")()
        for key, value in options.items():
            setattr(op.builtinOptions, key, value)

    def write(self) -> bytes:
        """Returns the bytes of the file, without constants that nothing uses any more."""
        graph, model = self.graph, self.model
        # Constants that were replaced keep their tensors, as indices must not move.
        used = {0, *(int(own.buffer) for own in model.metadata or [])}
        live = {int(index) for op in graph.operators for index in op.inputs}
        live |= {int(index) for index in graph.outputs}
        used |= {int(graph.tensors[index].buffer) for index in live if index >= 0}
        for index, buffer in enumerate(model.buffers):
            if index not in used:
                buffer.data = None
        ends = {int(index) for index in (*graph.inputs, *graph.outputs)}
        for index, tensor in enumerate(graph.tensors):
            if index not in ends and tensor.name:  # names of operations that were fused are long
                tensor.name = tensor.name.split(b";")[0].replace(b"jit(function)/", b"")
        builder = self._builder(1024)
        builder.Finish(model.Pack(builder), _IDENTIFIER)
        return bytes(builder.Output())


def _sharing(builder: Any) -> Any:
    """Returns a builder of flatbuffers that writes equal vectors and texts once.

    The format lets several tables refer to one vector. Each filter with scales for n outputs has n
    zero points of 8 bytes, all 0: they are a tenth of a MobileNet with 90 % zeros in int8.
    """

    class Sharing(builder):
        def __init__(self, size: int):
            super().__init__(size)
            self._written: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: np.ndarray) -> int:
            key = (x.dtype.str, x.tobytes())
            if key not in self._written:
                self._written[key] = super().CreateNumpyVector(x)
            return self._written[key]

        def CreateString(self, s: Any, *args: Any) -> int:
            key = ("text", bytes(s, "utf-8") if isinstance(s, str) else bytes(s))
            if key not in self._written:
                self._written[key] = super().CreateString(s, *args)
            return self._written[key]

    return Sharing
