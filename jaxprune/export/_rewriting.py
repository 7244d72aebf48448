"""Rewrites a .tflite: sparse and int8 filters, and what XNNPACK asks for sparse inference."""

from typing import Any, NamedTuple

import numpy as np

from jaxprune.export._tflite import Network

# Below this many entries the description of a tensor costs more than int8 saves.
_SMALL = 512
# The axis of the outputs in a filter.
_OUTPUTS = {"CONV_2D": 0, "FULLY_CONNECTED": 0, "DEPTHWISE_CONV_2D": 3}


class _Coded(NamedTuple):
    """A filter as int8: `values * scale` along an axis."""

    values: np.ndarray  # int8
    scale: np.ndarray  # float32 [outputs]
    axis: int


def cut_head(network: Network) -> int:
    """Puts a RESHAPE between a global average and a dense layer.

    XNNPACK counts the weights of a dense layer right behind the average when it decides whether
    enough weights are 0, and a RESHAPE ends what it counts.

    Args:
        network: the network, which is changed.

    Returns:
        How many heads were cut off.
    """
    graph, done = network.graph, 0
    for op in list(graph.operators):
        if network.kind(op) != "MEAN" or len(network.shape(int(op.inputs[0]))) != 4:
            continue
        out = int(op.outputs[0])
        readers = [own for own in graph.operators if out in own.inputs]
        if not any(network.kind(own) == "FULLY_CONNECTED" for own in readers):
            continue
        flat = network.shape(out)
        source = out
        if not op.builtinOptions.keepDims:
            source = network.add_tensor(out, "average/", (flat[0], 1, 1, flat[-1]))
            op.builtinOptions.keepDims = True
            op.outputs = np.array([source], np.int32)
        else:
            out = network.add_tensor(source, "flat/", (flat[0], flat[-1]))
            for own in readers:
                own.inputs = np.where(own.inputs == source, out, own.inputs)
        # The batch is left open, so that the inputs can still be resized.
        shape = np.array([-1, flat[-1]], np.int32)
        cut = network.operation(
            "RESHAPE", [source, network.add_constant("shape/of_head", shape)], [out]
        )
        network.set_options(cut, "ReshapeOptions", newShape=shape)
        graph.operators.insert(graph.operators.index(op) + 1, cut)
        done += 1
    return done


def pad_explicitly(network: Network) -> int:
    """Replaces SAME by the same padding in numbers where a convolution has a stride.

    The converter writes SAME for a padding of ((1, 1), (1, 1)) on images of odd size. XNNPACK has
    sparse inference for the numbers only, although both are the same there.

    Args:
        network: the network, which is changed.

    Returns:
        How many convolutions were changed.
    """
    graph, before, done = network.graph, [], 0
    for op in graph.operators:
        if network.kind(op) in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            done += _pad(network, before, op)
        before.append(op)
    graph.operators = before
    return done


def _pad(network: Network, operations: list[Any], op: Any) -> bool:
    """Pads the input of one convolution, if SAME pads both sides of it by half a window."""
    options, padding = op.builtinOptions, network.schema.Padding
    source = int(op.inputs[0])
    sizes, window = network.shape(source)[1:3], network.shape(int(op.inputs[1]))[1:3]
    strides = (options.strideH, options.strideW)
    plain = (options.dilationHFactor, options.dilationWFactor) == (1, 1)
    if options.padding != padding.SAME or max(strides) == 1 or not plain:
        return False
    total = [
        max((-(-size // stride) - 1) * stride + own - size, 0)
        for size, stride, own in zip(sizes, strides, window, strict=True)
    ]
    if any(own != side - 1 or own % 2 for own, side in zip(total, window, strict=True)):
        return False
    half = [own // 2 for own in total]
    amounts = np.array([[0, 0], [half[0]] * 2, [half[1]] * 2, [0, 0]], np.int32)
    batch, *_, channels = network.shape(source)
    shape = (batch, sizes[0] + total[0], sizes[1] + total[1], channels)
    padded = network.add_tensor(source, "padded/", shape)
    pad = network.operation("PAD", [source, network.add_constant("padding", amounts)], [padded])
    network.set_options(pad, "PadOptions")
    operations.append(pad)
    op.inputs = np.array([padded, *op.inputs[1:]], np.int32)
    options.padding = padding.VALID
    return True


def store_weights(network: Network, sparse: bool, int8: bool) -> int:
    """Stores filters sparse where that makes the file smaller, and as int8 if asked to.

    A sparse filter is a constant with the positions of its entries, behind a DENSIFY that the
    runtime carries out once. int8 values are followed by a DEQUANTIZE: the computation remains
    float32, as XNNPACK has no sparse inference for int8.

    Args:
        network: the network, which is changed.
        sparse: whether filters may become sparse.
        int8: whether filters become int8, with one scale for each output.

    Returns:
        How many filters are sparse.
    """
    graph, count = network.graph, 0
    before: list[Any] = []
    replaced: dict[int, int] = {}
    for op in graph.operators:
        kind = network.kind(op)
        source = int(op.inputs[1]) if kind in _OUTPUTS else -1
        weights = network.values(source) if source >= 0 and source not in replaced else None
        if weights is not None and weights.dtype == np.float32:
            coded = _int8(weights, _OUTPUTS[kind]) if int8 and weights.size > _SMALL else None
            is_sparse = sparse and _pays(weights if coded is None else coded.values)
            if coded is not None or is_sparse:
                replaced[source] = _store(network, before, source, weights, coded, is_sparse)
            count += is_sparse
        if source in replaced:
            op.inputs = np.array(op.inputs)
            op.inputs[1] = replaced[source]
        before.append(op)
    graph.operators = before
    return count


def _store(
    network: Network,
    operations: list[Any],
    source: int,
    weights: np.ndarray,
    coded: _Coded | None,
    is_sparse: bool,
) -> int:
    """Stores one filter and adds what unpacks it; returns the tensor with the filter."""
    tensors, schema = network.graph.tensors, network.schema
    whole = network.add_tensor(source, "filter/")
    values = weights if coded is None else coded.values
    dense = whole
    if coded is not None:
        tensors[source].type = schema.TensorType.INT8
        dense = network.add_tensor(source, "dense/") if is_sparse else source
        # Only what DEQUANTIZE reads has scales: 12 bytes for each output are not written twice.
        scale = schema.QuantizationParametersT()
        scale.scale, scale.zeroPoint = coded.scale, np.zeros(coded.scale.size, np.int64)
        scale.quantizedDimension = coded.axis
        tensors[dense].quantization = scale
    if is_sparse:
        tensors[source].sparsity = _sparsity(schema, values)
        unpack = network.operation("DENSIFY", [source], [dense])
        network.set_options(unpack, "DensifyOptions")
        operations.append(unpack)
        network.store(source, values[values != 0])
    else:
        network.store(source, values)
    if coded is not None:
        scaled = network.operation("DEQUANTIZE", [dense], [whole], 5)
        network.set_options(scaled, "DequantizeOptions")
        operations.append(scaled)
    return whole


def _int8(weights: np.ndarray, axis: int) -> _Coded:
    """Rounds weights to int8: each output has the scale that maps its largest weight to 127."""
    others = tuple(own for own in range(weights.ndim) if own != axis)
    largest = np.abs(weights).max(axis=others, keepdims=True)
    scale = np.maximum(largest, np.finfo(np.float32).tiny * 127) / np.float32(127)
    values = np.clip(np.round(weights / scale), -127, 127).astype(np.int8)
    return _Coded(values, scale.reshape(-1).astype(np.float32), axis)


def _pays(values: np.ndarray) -> bool:
    """Tells whether a filter is smaller as a sparse one."""
    kept = int(np.count_nonzero(values))
    rows = values.size // values.shape[-1] + 1
    segments = rows * _index_type(kept).itemsize
    each = values.itemsize + _index_type(values.shape[-1] - 1).itemsize
    return kept * each + segments < values.nbytes


def _index_type(largest: int) -> np.dtype:
    """Returns the smallest type of indices of the format."""
    return np.dtype(np.uint8 if largest < 2**8 else np.uint16 if largest < 2**16 else np.int32)


def _sparsity(schema: Any, values: np.ndarray) -> Any:
    """Describes the positions of the entries: dense dimensions, and rows of a CSR matrix."""
    found = schema.SparsityParametersT()
    found.traversalOrder = np.arange(values.ndim, dtype=np.int32)
    found.dimMetadata = []
    for size in values.shape[:-1]:
        dense = schema.DimensionMetadataT()
        dense.format, dense.denseSize = schema.DimensionType.DENSE, size
        found.dimMetadata.append(dense)
    rows = values.reshape(-1, values.shape[-1]) != 0
    last = schema.DimensionMetadataT()
    last.format, last.denseSize = schema.DimensionType.SPARSE_CSR, values.shape[-1]
    segments = np.concatenate([[0], np.cumsum(rows.sum(1))])
    last.arraySegmentsType, last.arraySegments = _indices(schema, segments, int(segments[-1]))
    columns = np.nonzero(rows)[1]
    last.arrayIndicesType, last.arrayIndices = _indices(schema, columns, values.shape[-1] - 1)
    found.dimMetadata.append(last)
    return found


def _indices(schema: Any, values: np.ndarray, largest: int) -> tuple[int, Any]:
    """Returns the kind of a vector of indices and the vector."""
    dtype = _index_type(largest)
    name = f"{dtype.name.capitalize()}Vector"
    vector = getattr(schema, name + "T")()
    vector.values = values.astype(dtype)
    return getattr(schema.SparseIndexVector, name), vector
