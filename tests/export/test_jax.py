"""`jax.export` files compute what the function computes, and need neither Flax nor jaxprune."""

import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import export, kernels
from tests.support import exported, phones

pytest.importorskip("flatbuffers", reason="flatbuffers: `pip install 'jaxprune[export]'`")

CPU = {"platforms": ("cpu",)}


def call(path, *inputs):
    return jax.export.deserialize(bytearray(path.read_bytes())).call(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("form", exported.FORMS)
@pytest.mark.parametrize("name", exported.NETWORKS)
def test_network_equals_jax_at_every_batch(name, form, tmp_path):
    apply, variables, masks, x = exported.network(name, form, 7)
    spec = jax.ShapeDtypeStruct(
        jax.export.symbolic_shape(f"b, {', '.join(map(str, x.shape[1:]))}"), x.dtype
    )
    path = tmp_path / "net.jax"
    report = export.jax(apply, variables, spec, path, masks=masks, check=x, **CPU)
    assert report.error <= 1e-5 * max(1, report.scale) and report.scale > 1e-3
    assert report.bytes == path.stat().st_size
    assert report.inputs == (f"float32[b,{','.join(map(str, x.shape[1:]))}]",)
    if masks is None:
        np.testing.assert_allclose(call(path, x[:1]), apply(variables, x[:1]), atol=1e-5)


def test_file_is_read_without_flax_and_jaxprune(tmp_path):
    path, out = tmp_path / "net.jax", tmp_path / "y.npy"
    apply, w, x = phones.network(), phones.weights(), phones.images(2)
    export.jax(apply, w, x, path, **CPU)
    np.save(tmp_path / "x.npy", x)
    code = f"""
import sys
sys.modules["flax"] = sys.modules["jaxprune"] = None
import jax, jax.export, numpy as np
run = jax.export.deserialize(bytearray(open({str(path)!r}, "rb").read())).call
np.save({str(out)!r}, run(np.load({str(tmp_path / "x.npy")!r})))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_allclose(np.load(out), apply(w, x), atol=1e-5)


def test_several_platforms_inputs_and_integer_keys(tmp_path):
    path = tmp_path / "net.jax"
    w = {0: {1: jnp.ones((3, 2))}, 10: jnp.ones(2), 2: jnp.zeros(2)}
    spec = (jax.ShapeDtypeStruct((1, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32))
    report = export.jax(lambda w, x, y: {0: x @ w[0][1] + w[10][None], 1: y}, w, spec, path)
    assert report.platforms == ("cpu", "cuda", "tpu")
    first, second = call(path, jnp.ones((1, 3)), jnp.arange(2.0))
    assert first.tolist() == [[4, 4]] and second.tolist() == [0, 1]
    assert "Not run" in str(report)


def test_bad_input(tmp_path):
    given = (lambda w, x: x * w, jnp.float32(2), jnp.ones((1, 3)))
    path = tmp_path / "net.jax"
    with pytest.raises(ValueError, match="must be among cpu, cuda, rocm, tpu, but has abacus"):
        export.jax(*given, path, platforms=("abacus",))
    with pytest.raises(ValueError, match="`apply` must be a function that JAX can trace"):
        export.jax(lambda w, x: float(x), *given[1:], path)
    with pytest.raises(ValueError, match="`masks` must have the paths"):
        export.jax(*given, path, masks={"a": True})
    kernel = jax.ffi.ffi_call("a_sparse_kernel", jax.ShapeDtypeStruct((1, 3), jnp.float32))
    with pytest.raises(ValueError, match="custom call.* `kernels.serve`"):
        export.jax(lambda w, x: kernel(x) * w, *given[1:], path, **CPU)
    wrapped = kernels.wrap(
        lambda w, x: x @ w, np.eye(3, dtype=bool), jnp.eye(3), given[2], table="always"
    )
    with pytest.raises(ValueError, match="`apply` cannot be exported: its kernels are custom"):
        export.jax(wrapped, jnp.eye(3), given[2], path)
    assert not path.exists()
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.jax(*given, path)
    assert path.read_bytes() == b"old"
