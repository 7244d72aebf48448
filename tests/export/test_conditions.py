"""`sparse_report` names the first operation that prevents sparse inference, and the cure."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import export
from tests.support import phones
from tests.support.mutations import damaged

pytest.importorskip(
    "litert_converter", reason="LiteRT is not installed; `make litert-check` has it"
)


def report(tmp_path, options=None, weights=None, channels=3, apply=None, size=16):
    apply = phones.network(**(options or {})) if apply is None else apply
    w = phones.weights(channels=channels, **{"width": 16, **(weights or {})})
    path = tmp_path / "net.tflite"
    written = export.litert(apply, w, phones.images(1, size, channels), path)
    found = export.sparse_report(path)
    assert written.sparse == found or np.isnan(found.zeros)
    return found


GOOD = {
    "plain": {},
    "5 classes": dict(weights={"classes": 5}),
    "a wide dense head": dict(weights={"classes": 2000}),
    "a pruned head": dict(weights={"classes": 40, "head_sparsity": 0.9}),
    "hard swish": dict(options={"activation": jax.nn.hard_swish}),
    "silu": dict(options={"activation": jax.nn.silu}),
    "relu": dict(options={"activation": jax.nn.relu}),
    "stride 1 in SAME": dict(options={"stride": 1, "padding": "SAME"}),
    "one more than 2/3": dict(weights={"sparsity": 0.68}),
    "odd images": dict(size=17),
}


@pytest.mark.parametrize("name", GOOD)
def test_network_runs_sparse(name, tmp_path):
    found = report(tmp_path, **GOOD[name])
    assert found.runs, str(found)
    assert (found.operation, found.reason, found.cure) == ("", "", "")
    assert found.zeros > 2 / 3


BAD = {
    "SAME in the stem": (
        dict(options={"stem_padding": "SAME"}),
        "0 CONV_2D",
        "its padding is SAME with stride 2",
        r"pad explicitly by \(\(1, 1\), \(1, 1\)\)",
    ),
    "SAME further down": (
        dict(options={"padding": "SAME"}),
        "DEPTHWISE_CONV_2D",
        "its padding is SAME with stride 2",
        "pad explicitly",
    ),
    "grey images": (dict(channels=1), "CONV_2D", "its input has 1 channel", "repeat grey images"),
    "four channels": (dict(channels=4), "CONV_2D", "its input has 4 channels", "three"),
    "stem of stride 1": (
        dict(options={"stem_stride": 1}),
        "0 CONV_2D",
        "its stride is 1, not 2",
        "a 3x3 convolution of stride 2",
    ),
    "stem of 5x5": (
        dict(
            apply=lambda w, x: phones.network()(w | {"stem": jnp.ones((5, 5, 3, 16)) / 75}, x),
            size=18,
        ),
        "CONV_2D",
        "its window is 5x5, not 3x3",
        "a 3x3 convolution of stride 2",
    ),
    "squeeze and excite": (
        dict(options={"middle": phones.squeeze_and_excite}),
        "MUL",
        "as squeeze-and-excite does",
        "without squeeze-and-excite",
    ),
    "3x3 in the middle": (
        dict(options={"middle": lambda w, x: phones.conv(x, w["middle"])}),
        "CONV_2D",
        "its window is 3x3",
        "make it a 1x1 convolution",
    ),
    "max pool": (
        dict(options={"middle": phones.max_pool}),
        "MAX_POOL_2D",
        "ends the layout",
        "use only 1x1 and depthwise",
    ),
    "concatenation": (
        dict(options={"middle": lambda w, x: jnp.concatenate([x[..., 8:], x[..., :8]], -1)}),
        "SLICE",
        "ends the layout",
        "use only 1x1 and depthwise",
    ),
    "a number is multiplied": (
        dict(options={"middle": lambda w, x: jnp.sin(x) * 3}),
        "MUL",
        "4 and 0 dimensions",
        "fold numbers",
    ),
    "1x1 of stride 2": (
        dict(options={"middle": lambda w, x: phones.conv(x, w["second"], 2)}),
        "CONV_2D",
        "its stride is 2",
        "move the stride to a depthwise one",
    ),
    "dilation": (
        dict(options={"stride": 1, "dilation": 2, "padding": ((2, 2), (2, 2))}),
        "DEPTHWISE_CONV_2D",
        "",
        "",
    ),
    "too few zeros": (
        dict(weights={"sparsity": 0.64}),
        "CONV_2D",
        "of which more than 2/3 must be",
        "prune 1x1 convolutions to 70 % or more",
    ),
    "features as a second output": (
        dict(options={"outputs": lambda features, logits: (features, logits)}),
        "ADD",
        "its result is an output",
        "only what comes after the global average",
    ),
    "nothing is pruned": (
        dict(weights={"sparsity": 0.0}),
        "",
        "no filter is stored as a sparse tensor",
        "at least 70 % zeros",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_obstacle_has_a_name_and_a_cure(name, tmp_path):
    given, operation, reason, cure = BAD[name]
    found = report(tmp_path, **given)
    assert not found.runs
    assert operation in found.operation
    assert re.search(reason, found.reason), found.reason
    assert re.search(cure, found.cure), found.cure
    assert "Sparse inference: no" in str(found) and "Cure:" in str(found)


def test_dense_head_counts_unless_it_is_cut_off(tmp_path, monkeypatch):
    """The head of 2000 classes has more weights than all 1x1 filters together."""
    from jaxprune.export import _litert

    assert report(tmp_path, weights={"classes": 2000}).runs
    monkeypatch.setattr(_litert, "cut_head", lambda network: 0)
    (tmp_path / "net.tflite").unlink()
    found = report(tmp_path, weights={"classes": 2000})
    assert not found.runs and "FULLY_CONNECTED" in found.operation
    assert "RESHAPE before the dense layer" in found.cure


def test_no_average(tmp_path):
    def apply(w, x):
        return jnp.max(
            phones.conv(phones.conv(x, w["stem"], 2, phones.EXPLICIT), w["first"]), (1, 2)
        )

    found = report(tmp_path, apply=apply)
    assert not found.runs and "REDUCE_MAX" in found.operation


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "net.tflite"
    export.litert(phones.network(), phones.weights(), phones.images(), path, values="int8")
    return path.read_bytes()


def test_not_a_tflite(tmp_path):
    path = tmp_path / "a.tflite"
    path.write_bytes(b"PK and much more than that")
    with pytest.raises(ValueError, match="a.tflite cannot be read: it is no .tflite file"):
        export.sparse_report(path)


def test_damaged_files_are_refused_or_read(content, tmp_path):
    path = tmp_path / "a.tflite"
    refused = 0
    for seed in range(400):
        path.write_bytes(damaged(content, seed))
        try:
            export.sparse_report(path)
        except ValueError as error:
            refused += 1
            assert "a.tflite cannot be read: it " in str(error), seed
    assert refused > 100
