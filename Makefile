# `make demo` and `make test` need nothing but make and Python 3.11 or newer (with its venv module).

VENV := .venv
PYTHON := $(VENV)/bin/python
# Test processes; each takes about one core and 2 GB.
WORKERS ?= 2
# More arguments, for example: make test ARGS="-k selection -x"
ARGS ?=
# Extra interpreters may be tried first: make demo PYTHON3=/opt/python/bin/python3
PYTHON3 ?=

CANDIDATES := $(PYTHON3) python3.11 python3.12 python3.13 python3.14 python3 python
# Those of pyenv need not be on the path.
NEWER := $(CANDIDATES) $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.*/bin/python3)
SOURCES := jaxprune tests scripts docs conftest.py .ci $(wildcard benchmarks examples)

# Pytest keeps its rewritten tests; without them each process would need five seconds more.
export PYTHONDONTWRITEBYTECODE :=
PYTEST = $(PYTHON) -m pytest -n logical --maxprocesses $(WORKERS) --dist worksteal
# What the markers of pyproject.toml leave.
FAST := not (slow or processes or scripts or faults)
# How many broken rules make test-faults tries, evenly spread: make test-faults FAULTS=8
FAULTS ?=
# How many times make test-faults damages each kind of file.
FUZZ_FILES ?= 5000

# What a new JAX is most likely to break, without what needs data sets or other libraries.
QUICK := test_trees test_stats test_scores test_budgets test_schedules test_selection \
	test_patterns test_masks test_checkpoints transforms/test_transforms transforms/test_agip \
	transforms/test_contract structure/test_operations structure/test_plans structure/test_fuzz \
	structure/test_shrinking training/test_training
# With 64-bit numbers on: what holds for 32 bits must hold for float64 leaves and wider defaults.
X64 := test_selection test_timetables test_patterns test_scores test_stats test_budgets \
	transforms/test_contract transforms/test_resume transforms/test_agip testing/test_asserts \
	elastic/test_clients search/test_problems reports/test_watching training/test_statistics structure/test_growing kernels/test_x64

# LiteRT.js comes from npm; pages load it from this machine.
LITERT_JS := @litertjs/core@2.5.3
MODULES := $(VENV)/browser/node_modules

.DELETE_ON_ERROR:
.PHONY: help demo demo-browser bench-browser browser-check test test-fast test-faults test-newest \
	test-quickly test-x64 coverage lint wheel format bench docs tpu-check cuda-check litert-check \
	onnx-check export-check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: $(VENV)/.train  ## train a small ResNet on real images, dense and pruned, and compare them
	$(PYTHON) scripts/demo.py

# The conversion has an environment of its own, as in litert-check.
demo-browser: $(VENV)/.train $(VENV)/.browser  ## train sparse MobileNets and time them in your browser
	@$(MAKE) --no-print-directory VENV=$(VENV)/litert $(VENV)/litert/.litert
	$(PYTHON) scripts/demo_browser.py --python $(VENV)/litert/bin/python --modules $(MODULES) $(ARGS)

test: $(VENV)/.test  ## run all tests but test-faults, README snippets and docstring examples
	$(PYTEST) -m "not faults" $(ARGS)

test-fast: $(VENV)/.test  ## run what needs no child processes and little time, about a minute
	$(PYTEST) -m "$(FAST)" $(ARGS)

test-faults: $(VENV)/.test  ## break the rules of `structure` one by one, and files by thousands
	JAXPRUNE_FAULTS=$(FAULTS) JAXPRUNE_FUZZ_FILES=$(FUZZ_FILES) \
	  $(PYTEST) -m faults tests/structure tests/files tests/test_checkpoints.py $(ARGS)

# An environment with the newest Python that is here and the newest JAX, Flax and Optax.
test-newest:  ## run a quick suite on the newest JAX and Python, about four minutes
	@newest=$$(for python in $(NEWER); do "$$python" -c 'import sys, venv, ensurepip; \
	    sys.version_info < (3, 12) or print(*sys.version_info[:3], sys.executable)' 2>/dev/null; \
	  done | sort -n -k 1,1 -k 2,2 -k 3,3 | tail -n 1 | cut -d " " -f 4-); \
	if [ -n "$$newest" ]; then \
	  $(MAKE) --no-print-directory VENV=.venv-newest PYTHON3="$$newest" test-quickly; \
	else \
	  echo "make test-newest: skipped, as there is no Python 3.12 or newer with the venv module."; \
	  echo "Tried: $(strip $(NEWER))."; \
	fi

test-quickly: $(VENV)/.python
	@echo "Installing the newest JAX, Flax, Optax and what tests of them need into $(VENV)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade \
	  --upgrade-strategy eager --editable . chex hypothesis pytest pytest-xdist
	@$(PYTHON) -m pip list --disable-pip-version-check | grep -iE '^(jax|jaxlib|flax|optax) '
	$(PYTEST) -m "not (processes or scripts or faults)" $(QUICK:%=tests/%.py) \
	  --deselect tests/training/test_training.py::test_loss_falls_on_digits $(ARGS)

test-x64: $(VENV)/.test  ## run the laws with jax_enable_x64, about three minutes
	JAX_ENABLE_X64=1 $(PYTEST) -m "not faults" $(X64:%=tests/%.py) $(ARGS)

# Only what runs in the test processes themselves counts, so the commands of scripts/ look untested.
coverage:  ## run the fast tests and print which lines of the library they run
	@$(MAKE) --no-print-directory test-fast \
	  ARGS="--cov=jaxprune --cov-report=term:skip-covered $(ARGS)"

lint: $(VENV)/.dev  ## check style, formatting and types
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m pyright

# The other environment has the wheel alone, and the packages of this one through a path file. It
# is written last: pip must not see the checkout that is installed here.
OUTSIDE := $(VENV)/outside
PACKAGES := import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")

# The wheel is built from the source distribution, so that one is whole, too.
wheel: $(VENV)/.dev  ## build sdist and wheel, install the wheel elsewhere and use it outside of the checkout
	rm -rf build dist $(OUTSIDE)
	$(PYTHON) -m build --outdir dist . >/dev/null
	rm -rf build
	$(PYTHON) -m venv --without-pip $(OUTSIDE)
	$(PYTHON) -m pip --python $(OUTSIDE)/bin/python install --quiet --disable-pip-version-check \
	  --no-deps dist/jaxprune-*.whl
	$(PYTHON) -c '$(PACKAGES)' >"$$($(OUTSIDE)/bin/python -c '$(PACKAGES)')/shared.pth"
	cd $(OUTSIDE) && env -u PYTHONPATH bin/python "$(CURDIR)/.ci/outside.py"
	cd $(OUTSIDE) && env -u PYTHONPATH bin/python -m jaxprune train --help >/dev/null
	@echo "The wheel works outside of the checkout: $$(ls dist/*.whl), from $$(ls dist/*.tar.gz)"

format: $(VENV)/.dev  ## rewrite the sources in the project's style
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

bench: $(VENV)/.train  ## time the optimizer step, selection against sorting, and compacted networks
	$(PYTHON) benchmarks/step.py
	$(PYTHON) benchmarks/selection.py
	$(PYTHON) benchmarks/packed_state.py
	$(PYTHON) benchmarks/structure.py
	$(PYTHON) benchmarks/layers.py
	$(PYTHON) benchmarks/blocks.py
	$(PYTHON) benchmarks/loop.py

# Sphinx has its own environment. It reads what has changed only; warnings are errors.
docs:  ## build the site from docs/ and the docstrings into docs/_build/html
	@$(MAKE) --no-print-directory VENV=$(VENV)/docs $(VENV)/docs/.docs
	$(VENV)/docs/bin/python -m sphinx -q -W --keep-going docs docs/_build/html $(ARGS)
	@echo "The site is docs/_build/html/index.html"

bench-browser: $(VENV)/.browser  ## time sparse networks in headless Chromium, LiteRT and XLA
	@$(MAKE) --no-print-directory VENV=$(VENV)/litert $(VENV)/litert/.litert
	$(VENV)/litert/bin/python benchmarks/browser.py --modules $(MODULES) $(ARGS)

# On a machine of continuous integration Chromium is installed; elsewhere that is up to its owner.
browser-check:  ## test the page in headless Chromium, where npm and Chromium are
	@[ -z "$(CI)" ] || command -v chromium >/dev/null || \
	  { apt-get update -q && apt-get install -y -q chromium npm; } >/dev/null 2>&1 || true
	@if command -v npm >/dev/null && command -v chromium >/dev/null && \
	    $(MAKE) --no-print-directory $(VENV)/.browser && \
	    $(MAKE) --no-print-directory VENV=$(VENV)/litert $(VENV)/litert/.litert; then \
	  JAXPRUNE_MODULES=$(abspath $(MODULES)) $(VENV)/litert/bin/python -m pytest \
	    -p no:cacheprovider -rs tests/browser $(ARGS); \
	else \
	  echo "make browser-check: skipped, as npm, Chromium or a package is missing here"; \
	  echo "(Debian, Ubuntu: apt-get install npm chromium)."; \
	fi

# Its own environment: with libtpu installed, every other use of JAX would look for a TPU first.
tpu-check:  ## compile the training step and block products for TPUs that are not there
	@$(MAKE) --no-print-directory VENV=$(VENV)/tpu $(VENV)/tpu/.tpu
	$(VENV)/tpu/bin/python scripts/compile_for_tpu.py $(ARGS)
	$(VENV)/tpu/bin/python scripts/compile_for_tpu.py --blocks

# As above; it takes 6 GB on disk with CUDA's libraries.
cuda-check:  ## compile the training step and block products for GPUs that are not there
	@$(MAKE) --no-print-directory VENV=$(VENV)/cuda $(VENV)/cuda/.cuda
	$(VENV)/cuda/bin/python scripts/compile_for_tpu.py --platform cuda $(ARGS)
	$(VENV)/cuda/bin/python scripts/compile_for_tpu.py --platform cuda --blocks

# In environments of their own: both need older versions of packages than the other tests. Where the
# packages do not exist (litert-converter: Linux on x86-64 and macOS on ARM), it says so and is skipped.
litert-check:  ## run exported .tflite files in LiteRT, about two minutes
	@$(MAKE) --no-print-directory TARGET=litert export-check

onnx-check:  ## run exported .onnx files in onnxruntime, about two minutes
	@$(MAKE) --no-print-directory TARGET=onnx export-check

export-check:
	@if $(MAKE) --no-print-directory VENV=$(VENV)/$(TARGET) $(VENV)/$(TARGET)/.$(TARGET); then \
	  $(VENV)/$(TARGET)/bin/python -m pytest -p no:cacheprovider -m "not faults" -rs \
	    tests/export jaxprune/export tests/test_storage_packed.py \
	    "tests/project/test_readme.py::test_python_blocks_run[deploy.md]" $(ARGS); \
	else \
	  echo "make $(TARGET)-check: skipped, as its packages cannot be installed here."; \
	fi

clean:  ## remove the virtual environment, caches and build products
	rm -rf $(VENV) .venv-newest .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info \
	  docs/_build docs/api

# The first interpreter that is new enough and has venv makes the environment.
$(VENV)/.python:
	@for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    [ -x $(PYTHON) ] || "$$python" -m venv $(VENV) || exit 1; \
	    touch $@; exit 0; \
	  fi; \
	done; \
	echo "jaxprune needs Python 3.11 or newer with the venv module, and none was found." >&2; \
	echo "Tried: $(strip $(CANDIDATES))." >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it:" >&2; \
	echo "  make $(or $(firstword $(MAKECMDGOALS)),demo) PYTHON3=/path/to/python3" >&2; \
	exit 1

# One stamp an extra: pip runs again only when pyproject.toml has changed.
$(VENV)/.train $(VENV)/.test $(VENV)/.dev $(VENV)/.docs $(VENV)/.tpu $(VENV)/.cuda: $(VENV)/.%: pyproject.toml | $(VENV)/.python
	@echo "Installing jaxprune and what '$*' needs into $(VENV) (about a minute the first time)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

# Only the tests of jaxprune.export run there.
$(VENV)/.litert $(VENV)/.onnx: $(VENV)/.%: pyproject.toml | $(VENV)/.python
	@echo "Installing jaxprune and what '$*' needs into $(VENV) (about a minute the first time)"
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".[$*,export]" \
	  hypothesis pytest
	@touch $@

$(VENV)/.browser: Makefile | $(VENV)/.python
	@command -v npm >/dev/null || \
	  { echo "LiteRT.js needs npm (Debian, Ubuntu: apt-get install npm)." >&2; exit 1; }
	@echo "Installing $(LITERT_JS) into $(VENV)/browser"
	@npm install --prefix $(VENV)/browser --no-save --ignore-scripts --no-audit --no-fund \
	  --silent $(LITERT_JS)
	@touch $@
