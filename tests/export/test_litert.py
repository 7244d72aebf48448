"""Files for LiteRT compute what JAX computes; bad input is refused before anything is written."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import export
from jaxprune.export import _tflite
from tests.support import exported, phones

pytest.importorskip(
    "litert_converter", reason="LiteRT is not installed; `make litert-check` has it"
)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("form", exported.FORMS)
@pytest.mark.parametrize("name", exported.NETWORKS)
def test_network_equals_jax(name, form, batch, tmp_path):
    apply, variables, masks, x = exported.network(name, form, batch)
    path = tmp_path / "net.tflite"
    report = export.litert(apply, variables, x, path, masks=masks, check=x)
    assert report.scale > 1e-3
    assert report.error <= 1e-5 * max(1, report.scale)
    assert report.bytes == path.stat().st_size
    assert (report.sparse.sparse_tensors > 0) == (form == "masked")


@pytest.mark.parametrize("size", [16, 17, 18])
@pytest.mark.parametrize("values", ["float32", "int8"])
def test_sparse_network_equals_jax_and_is_small(values, size, tmp_path):
    """Images of odd size: the converter writes SAME, which is rewritten as padding in numbers."""
    apply, w, x = phones.network(), phones.weights(width=16), phones.images(size=size)
    small = export.litert(apply, w, x, tmp_path / "a.tflite", values=values, check=x)
    whole = export.litert(apply, w, x, tmp_path / "b.tflite", values=values, sparse=False, check=x)
    assert small.error <= (1e-6 if values == "float32" else 0.02 * small.scale)
    assert whole.error == pytest.approx(small.error, abs=1e-6)
    assert small.bytes < whole.bytes
    assert small.sparse.runs and not whole.sparse.runs
    assert small.sparse.zeros == pytest.approx(0.9, abs=0.02)
    assert export.sparse_report(tmp_path / "a.tflite") == small.sparse
    assert "Sparse inference: yes" in str(small)


def test_int8_makes_files_a_quarter(tmp_path):
    apply, w, x = phones.network(), phones.weights(width=48, sparsity=0.0), phones.images()
    sizes = [
        export.litert(apply, w, x, tmp_path / f"{values}.tflite", values=values).bytes
        for values in ("float32", "int8")
    ]
    assert sizes[1] < 0.4 * sizes[0]


def test_equal_vectors_are_written_once(tmp_path, monkeypatch):
    """The zero points of int8 filters, all 0, and shapes are shared; the network is the same."""
    given = (phones.network(), phones.weights(width=16), phones.images(), tmp_path / "net.tflite")
    options = dict(values="int8", check=phones.images(), overwrite=True)
    shared = export.litert(*given, **options)
    monkeypatch.setattr(_tflite, "_sharing", lambda builder: builder)
    apart = export.litert(*given, **options)
    assert shared.bytes < apart.bytes - 8 * 64 and shared.error == apart.error


def test_int8_error_is_that_of_rounded_weights(tmp_path):
    """One layer: the runtime must use exactly round(w / scale) * scale with a scale per output."""
    w = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32) * np.arange(1, 25)
    w = w.astype(np.float32)
    x = np.eye(32, dtype=np.float32)
    path = tmp_path / "a.tflite"
    report = export.litert(lambda w, x: x @ w, jnp.asarray(w), x, path, values="int8", check=x)
    scale = np.abs(w).max(0) / np.float32(127)
    wanted = np.abs(np.round(w / scale) * scale - w).max()
    assert report.error == pytest.approx(wanted, rel=1e-3)
    assert report.operations["DEQUANTIZE"] == 1


def test_batch_can_be_resized(tmp_path):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    apply, w, x = phones.network(), phones.weights(), phones.images(5)
    path = tmp_path / "net.tflite"
    export.litert(apply, w, x[:1], path)
    run = interpreter.Interpreter(model_path=str(path))
    (place,), (result,) = run.get_input_details(), run.get_output_details()
    run.resize_tensor_input(place["index"], x.shape)
    run.allocate_tensors()
    run.set_tensor(place["index"], x)
    run.invoke()
    np.testing.assert_allclose(run.get_tensor(result["index"]), apply(w, x), atol=1e-5)


def test_several_inputs_and_outputs(tmp_path):
    def apply(w, x, y):
        return {"sum": x @ w + y, "relu": jax.nn.relu(y)}

    spec = (jax.ShapeDtypeStruct((1, 4), jnp.float32), jax.ShapeDtypeStruct((1, 3), jnp.float32))
    w = jnp.ones((4, 3))
    check = (phones.images(6, 2, 1).reshape(6, 4), np.arange(18, dtype=np.float32).reshape(6, 3))
    report = export.litert(apply, w, spec, tmp_path / "net.tflite", check=check)
    assert report.error <= 1e-6 and report.scale == pytest.approx(17, abs=4)


def test_masks_are_applied(tmp_path):
    w, x = phones.weights(sparsity=0.0, width=16), phones.images()
    pruned, masks = jaxprune.prune(w, 0.9, prunable=["first", "second"])
    reports = [
        export.litert(phones.network(), tree, x, tmp_path / f"{k}.tflite", masks=own, check=x)
        for k, (tree, own) in enumerate([(w, masks), (pruned, None)])
    ]
    assert reports[0].bytes == reports[1].bytes and reports[0].sparse.runs
    assert reports[0].error <= 1e-6


REFUSED = {
    "values": (dict(values="float16"), ValueError, "`values` must be 'float32' or 'int8'"),
    "function": (dict(apply=3), TypeError, "`apply` must be a function"),
    "trace": (
        dict(apply=lambda w, x: x if x.sum() > 0 else w),
        ValueError,
        r"`apply` must be a function that JAX can trace.*float32\[1,3\].*TracerBoolConversionError",
    ),
    "nothing": (dict(apply=lambda w, x: None), ValueError, "must return at least one array"),
    "symbols": (
        dict(example=jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3"), jnp.float32)),
        ValueError,
        r"(?s)`example` must have fixed sizes.*input 0: \(b, 3\)",
    ),
    "no array": (dict(example=[1, 2]), ValueError, "`example` must be an array"),
    "masks": (dict(masks={"v": True}), ValueError, "(?s)`masks` must have the paths.*v"),
    "check shape": (
        dict(check=np.ones((2, 4), np.float32)),
        ValueError,
        r"`check` must have the shapes of `example`, float32\[1, 3\].*float32\[2, 4\]",
    ),
    "check dtype": (dict(check=np.ones((2, 3), np.int32)), ValueError, "int32"),
    "check count": (dict(check=(np.ones((1, 3), np.float32),) * 2), ValueError, "`check` must"),
    "operation": (
        dict(apply=lambda w, x: jax.scipy.linalg.cholesky(x.T @ x)),
        ValueError,
        "`apply` must use operations that LiteRT knows",
    ),
    "folder": (
        dict(path="/nowhere/net.tflite"),
        FileNotFoundError,
        "must be in an existing folder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_and_nothing_is_written(name, tmp_path):
    change, kind, message = REFUSED[name]
    path = tmp_path / "net.tflite"
    given = dict(
        apply=lambda w, x: x * w["a"],
        variables={"a": jnp.ones((1, 3))},
        example=np.ones((1, 3), np.float32),
        path=path,
    )
    with pytest.raises(kind, match=message):
        export.litert(**{**given, **change})
    assert list(tmp_path.iterdir()) == []


def test_existing_file_is_kept(tmp_path):
    path = tmp_path / "net.tflite"
    path.write_bytes(b"old")
    given = (lambda w, x: x * w, jnp.float32(2), jnp.ones((1, 3)), path)
    with pytest.raises(FileExistsError, match="exists; take another name or `overwrite=True`"):
        export.litert(*given)
    assert path.read_bytes() == b"old"
    assert export.litert(*given, overwrite=True).bytes == path.stat().st_size


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "net.tflite"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*net.tflite"):
        export.litert(lambda w, x: x * w, jnp.float32(2), jnp.ones((1, 3)), path, overwrite=True)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
