"""ONNX files compute in onnxruntime what JAX computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import export
from tests.support import exported

pytest.importorskip("jax2onnx", reason="ONNX: `make onnx-check`")


@pytest.mark.slow
@pytest.mark.parametrize("form", exported.FORMS)
@pytest.mark.parametrize("name", exported.NETWORKS)
def test_network_equals_jax(name, form, tmp_path):
    apply, variables, masks, x = exported.network(name, form, 7)
    path = tmp_path / "net.onnx"
    report = export.onnx(apply, variables, x, path, masks=masks, check=x)
    assert report.scale > 1e-3
    assert report.error <= 1e-5 * max(1, report.scale)
    assert report.bytes == path.stat().st_size


def test_inputs_outputs_and_batches(tmp_path):
    spec = (jax.ShapeDtypeStruct((1, 4), jnp.float32), jax.ShapeDtypeStruct((1, 3), jnp.float32))
    check = (np.ones((6, 4), np.float32), np.arange(18, dtype=np.float32).reshape(6, 3))
    w = jnp.ones((4, 3))
    report = export.onnx(
        lambda w, x, y: {"sum": x @ w + y, "relu": jax.nn.relu(y)},
        w,
        spec,
        tmp_path / "net.onnx",
        check=check,
    )
    assert report.error <= 1e-6 and report.scale == 21


def test_bad_input(tmp_path):
    given = (lambda w, x: x * w, jnp.float32(2), jnp.ones((1, 3)))
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="`check` must have the shapes"):
        export.onnx(*given, path, check=np.ones((1, 4), np.float32))
    with pytest.raises(ValueError, match="operations that jax2onnx knows"):
        export.onnx(lambda w, x: jax.pure_callback(np.sin, x, x), *given[1:], path)
    assert not path.exists()
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.onnx(*given, path)
    assert path.read_bytes() == b"old"
