"""Memory of the process: faults of pages are counted in processes of their own."""

import platform
import subprocess
import sys

import pytest

from jaxprune import training

# Allocates and fills 64 MB twenty times; prints how many pages the system had to provide.
COUNT = """
import resource, sys
import numpy as np
from jaxprune import training
if sys.argv[1] == "kept":
    assert training.keep_memory()
def fill():
    return np.ones(2**23).sum()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.processes
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_pages_are_provided_once():
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", COUNT, mode], text=True))
        for mode in ("kept", "given back")
    }
    assert faults["kept"] * 10 < faults["given back"], faults


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    assert training.keep_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(training._memory.ctypes, "CDLL", lambda _: object())
    assert training.keep_memory() is False
