"""How the library comes to a machine: compilers, the cache, and what happens without them."""

import fnmatch
import os
import shutil
import stat
import subprocess
import sys
import time
import tomllib
import types
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import kernels
from jaxprune.kernels import _building
from tests.conftest import ROOT

CODE = """
import warnings
import jax.numpy as jnp, numpy as np
from jaxprune import kernels
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    indices = kernels.product_indices(np.array([[True, False], [True, True]]))
    for _ in range(2):
        print(kernels.sparse_product(jnp.ones((1, 2)), jnp.ones((2, 2)), indices).tolist())
print("reason:", kernels.available())
print("warnings:", sum("sparse kernels are not used" in str(own.message) for own in seen))
"""


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and a compiler that copies a file instead of compiling."""
    monkeypatch.setenv("JAXPRUNE_CACHE", str(tmp_path / "cache"))
    log = tmp_path / "log"
    fake = tmp_path / "compiler"
    fake.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1; exit; fi\n'
        f'echo called >> {log}\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    return tmp_path


def calls(folder):
    """How often the compiler has compiled."""
    log = folder / "log"
    return log.read_text().count("called") if log.exists() else 0


def test_compiles_once(fresh):
    folder, key = _building.cache_folder(), _building.build_key(_building.compiler())
    path = _building.built(folder, key)
    assert path.read_text() == "library\n"
    assert _building.built(folder, key) == path and calls(fresh) == 1
    assert [own.name for own in folder.iterdir()] == [path.name]  # no lock, nothing half-written


def test_a_damaged_library_is_built_again(fresh):
    folder, key = _building.cache_folder(), "k"
    path = _building.built(folder, key)
    path.write_text("librar")
    assert _building.built(folder, key).read_text() == "library\n" and calls(fresh) == 2
    stranger = folder / f"kernels-{key}-0123.so"
    path.rename(stranger)
    assert _building.built(folder, key) == path and not stranger.exists()


def test_the_key_follows_compiler_and_sources(fresh, monkeypatch):
    compiler = _building.compiler()
    key = _building.build_key(compiler)
    assert _building.build_key(compiler) == key
    text = (fresh / "compiler").read_text()
    (fresh / "compiler").write_text(text.replace("fake 1", "fake 2"))
    assert _building.build_key(compiler) != key
    (fresh / "compiler").write_text(text)
    copy = shutil.copytree(_building.SOURCES, fresh / "native")
    (copy / "cores.h").write_text((copy / "cores.h").read_text() + "// changed\n")
    monkeypatch.setattr(_building, "SOURCES", copy)
    assert _building.build_key(compiler) != key
    monkeypatch.setattr(_building, "_processor", lambda: "another CPU")
    assert _building.build_key(compiler) != key


def test_the_folder_is_private(fresh):
    folder = _building.cache_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(ValueError, match="must belong to you and be writable by nobody.*chmod"):
        _building.cache_folder()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no C\\+\\+ compiler.*apt install.*CXX"):
        _building.compiler()


def test_a_compiler_that_fails(fresh):
    (fresh / "compiler").write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="compiler failed(.|\n)*no such thing(.|\n)*Set CXX"):
        _building.built(_building.cache_folder(), "k")
    assert list(_building.cache_folder().iterdir()) == []


def test_waits_for_another_process(fresh, monkeypatch):
    """While another process compiles, this one waits and then takes its library."""
    folder = _building.cache_folder()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            held.close()

    held = ExitStack()
    held.enter_context(_building.files.locked(folder))
    clock = types.SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr(_building, "time", clock)
    assert _building.built(folder, "k").exists() and len(waited) == 3
    monkeypatch.setattr(_building, "_PATIENCE", -1.0)
    with (
        _building.files.locked(folder),
        pytest.raises(ValueError, match="the cache folder .*in use"),
    ):
        _building.built(folder, "other")


def run(environment, **changes):
    """Runs a product in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment | changes, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_without_a_compiler_the_product_is_dense_and_warns_once(environment, tmp_path):
    text = run(environment, CXX=str(tmp_path / "none"), JAXPRUNE_CACHE=str(tmp_path))
    assert text.count("[[2.0, 1.0]]") == 2 and "warnings: 1" in text
    assert "reason: there is no C++ compiler" in text


@pytest.mark.slow
def test_a_library_that_does_not_load_is_a_warning(environment, fresh):
    text = run(environment, **{key: os.environ[key] for key in ("CXX", "JAXPRUNE_CACHE")})
    assert text.count("[[2.0, 1.0]]") == 2 and "warnings: 1" in text and "reason: None" not in text


def test_sources_are_in_the_wheel():
    """Each source is package data; test_release.py builds the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["jaxprune"]
    for path in _building.SOURCES.iterdir():
        name = path.relative_to(ROOT / "jaxprune").as_posix()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name


def test_targets_are_named_after_the_build():
    if reason := kernels.available():
        pytest.skip(reason)
    indices = kernels.product_indices(np.ones((2, 2), bool))
    text = str(
        jax.jit(lambda x: kernels.sparse_product(x, x, indices)).lower(jnp.ones((2, 2))).as_text()
    )
    assert _building.target("jaxprune_product_forward") in text
