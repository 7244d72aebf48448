"""Memory of the process: faults of pages are counted in processes of their own."""

import platform
import subprocess
import sys
from pathlib import Path

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


# Frees more than 2 GiB, of which a few pages were used, and uses them again.
MUCH = """
import ctypes, resource
from jaxprune import training
assert training.keep_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
def fill():
    start = library.malloc(5 * 2**29)
    for place in range(0, 5 * 2**29, 2**23):
        ctypes.c_char.from_address(start + place).value = 1
    library.free(ctypes.c_void_p(start))
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# Prints the flags of the pages of 64 MB, from a process that may have few addresses. NumPy's
# arrays always ask for huge pages.
FLAGS = """
import ctypes, resource, sys
from jaxprune import training
if sys.argv[1] != "all":
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
assert training.keep_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
middle = library.malloc(2**26) + 2**25
for line in open("/proc/self/smaps"):
    words = line.split()
    if "-" in words[0] and len(words) > 4:
        start, stop = (int(word, 16) for word in words[0].split("-"))
    elif words[0] == "VmFlags:" and start <= middle < stop:
        print(*words[1:])
"""
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs the GNU C library"
)


def _run(code, *args):
    """Returns what a program prints."""
    return subprocess.check_output([sys.executable, "-c", code, *args], text=True)


@pytest.mark.processes
@needs_glibc
def test_any_number_of_bytes_is_kept():
    assert int(_run(MUCH)) < 100, "of 320 pages that were used before"


@pytest.mark.processes
@needs_glibc
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages"
)
def test_large_arrays_have_huge_pages():
    assert "hg" in _run(FLAGS, "all").split()


@pytest.mark.processes
@needs_glibc
def test_few_addresses_are_enough():
    assert _run(FLAGS, str(8 * 2**30)), "it goes on without huge pages"


@pytest.mark.processes
@needs_glibc
def test_pages_are_provided_once():
    faults = {mode: int(_run(COUNT, mode)) for mode in ("kept", "given back")}
    assert faults["kept"] * 10 < faults["given back"], faults


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_left_alone(monkeypatch, system):
    monkeypatch.setattr(sys, "platform", system)
    assert training.keep_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(training._memory.ctypes, "CDLL", lambda _: object())
    assert training.keep_memory() is False
