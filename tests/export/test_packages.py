"""Targets that are not installed: the error names the package and the command that installs it."""

import importlib

import jax.numpy as jnp
import pytest

from jaxprune import export

CASES = {
    "litert": ("litert_converter", r"'jaxprune\[litert\]'` into an environment of its own.*Linux"),
    "onnx": ("jax2onnx", r"'jaxprune\[onnx\]'` into an environment of its own"),
    "jax": ("flatbuffers", r"'jaxprune\[export\]'`\.$"),
}


@pytest.fixture
def without_packages(monkeypatch):
    """Python as if no optional package was installed."""
    real = importlib.import_module

    def fail(name, *args):
        if name.partition(".")[0] in {own for own, _ in CASES.values()} | {"safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", fail)


@pytest.mark.parametrize("target", CASES)
def test_error_says_what_to_install(target, without_packages, tmp_path):
    package, command = CASES[target]
    given = (lambda w, x: x * w, jnp.float32(2), jnp.ones((1, 3)), tmp_path / "net")
    with pytest.raises(ModuleNotFoundError, match=f"`export.{target}` needs {package}.*{command}"):
        getattr(export, target)(*given)
    assert list(tmp_path.iterdir()) == []


def test_safetensors_too(without_packages, tmp_path):
    with pytest.raises(ModuleNotFoundError, match="`export.safetensors` needs safetensors"):
        export.safetensors({"w": jnp.ones(2)}, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []
