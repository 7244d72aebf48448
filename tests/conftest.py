"""Makes JAX strict for every test, and quick to compile: see `QUICK`."""

import mmap
import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Tests run each program a few times, so most of their time is compilation. These flags make XLA
# compile six times faster (0.9 instead of 5.5 CPU seconds for four training steps of
# transforms/test_contract.py) and its programs slower. Both sides of a comparison have them, and so
# have child processes. Flags in XLA_FLAGS come after these and win:
#   XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true" make test
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def quick_flags() -> str:
    """Those of `QUICK` that this jaxlib knows: XLA ends the process at a flag it does not know."""
    library = Path(find_spec("jaxlib").origin).with_name("libjax_common.so")
    if not library.exists():
        return ""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        known = [name for name in QUICK if text.find(name.encode()) >= 0]
    # From jaxlib 0.11 on this is a name in the library, but no flag any more.
    if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 11):
        known = [name for name in known if name != "xla_cpu_use_fusion_emitters"]
    return " ".join(f"--{name}={QUICK[name]}" for name in known)


# JAX reads these when it is imported or first looks for devices, so they come before any import.
# (A worker of pytest-xdist finds the number of devices that its parent has set.)
_DEVICES = "--xla_force_host_platform_device_count"
_GIVEN = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(_DEVICES)]
ONE_DEVICE = " ".join([quick_flags(), *_GIVEN]).strip()
os.environ["XLA_FLAGS"] = f"{ONE_DEVICE} {_DEVICES}=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs are kept in the checkout; the next run and child processes find them there.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
# The C++ library of jaxprune.kernels is kept there, too.
os.environ.setdefault("JAXPRUNE_CACHE", str(ROOT / ".cache" / "jaxprune"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Compilation makes single examples slow, so no deadlines; fixed examples make failures repeat.
# More of them: HYPOTHESIS_PROFILE=thorough make test
_COMMON = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("default", max_examples=25, derandomize=True, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=500, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops compiled programs when there are many: each takes about ten mappings of memory.

    Linux allows a process 65,530; beyond them XLA dies of a segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def environment():
    """The environment of child processes: one device instead of eight."""
    return os.environ | {"XLA_FLAGS": ONE_DEVICE}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Marks what starts child processes, all of which get `environment`."""
    for item in items:
        if "environment" in item.fixturenames and not item.get_closest_marker("processes"):
            item.add_marker("scripts")
