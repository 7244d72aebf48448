"""safetensors hold every leaf under its path, with masks and the plan beside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import export, structure

numpy = pytest.importorskip("safetensors.numpy")


def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"a": [jax.random.normal(keys[0], (4, 6))], "b": {3: jax.random.normal(keys[1], (6, 2))}}


def test_weights_and_masks_come_back(tmp_path):
    pruned, masks = jaxprune.prune(params(), 0.5)
    report = export.safetensors(params(), tmp_path / "net.safetensors", masks=masks)
    found = numpy.load_file(tmp_path / "net.safetensors")
    kept = numpy.load_file(tmp_path / "net.masks.safetensors")
    assert set(found) == set(kept) == {"a/0", "b/3"}
    np.testing.assert_array_equal(found["a/0"], pruned["a"][0])
    np.testing.assert_array_equal(kept["b/3"], masks["b"][3])
    assert report.tensors == 2
    assert list(report.files.values()) == [
        (tmp_path / name).stat().st_size for name in ("net.safetensors", "net.masks.safetensors")
    ]


def test_plan_lies_beside_the_weights(tmp_path):
    def apply(w, x):
        return jax.nn.relu(x @ w["a"][0]) @ w["b"][3]

    x = jnp.ones((1, 4))
    groups = structure.find_groups(apply, params(), x)
    plan = groups.plan(structure.keep_global(groups, structure.filter_norms(groups, params()), 0.5))
    small = plan.compact(params())
    export.safetensors(small, tmp_path / "net.safetensors", plan=plan)
    again = structure.load_plan(tmp_path / "net.plan.json")
    found = numpy.load_file(tmp_path / "net.safetensors")
    tree = {"a": [found["a/0"]], "b": {3: found["b/3"]}}
    np.testing.assert_allclose(again.wrap(apply)(tree, x), plan.wrap(apply)(small, x))


def test_bfloat16(tmp_path):
    export.safetensors({"w": jnp.full(3, 1.5, jnp.bfloat16)}, tmp_path / "net.safetensors")
    content = (tmp_path / "net.safetensors").read_bytes()
    assert b'"BF16"' in content
    values = jnp.asarray(np.frombuffer(content[-6:], jnp.bfloat16))
    assert values.tolist() == [1.5] * 3


def test_bad_input(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(ValueError, match="(?s)dtypes that safetensors knows.*w: complex128"):
        export.safetensors({"w": np.ones(2, complex)}, path)
    with pytest.raises(ValueError, match="`masks` must have the paths"):
        export.safetensors(params(), path, masks={"c": True})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "net.masks.safetensors").write_bytes(b"old")
    with pytest.raises(FileExistsError, match="net.masks.safetensors exists"):
        export.safetensors(params(), path, masks=jaxprune.prune(params(), 0.5)[1])
    assert [own.name for own in tmp_path.iterdir()] == ["net.masks.safetensors"]
