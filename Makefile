# Two commands: `make demo` and `make test`. Both set everything up in .venv first; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
WORKERS ?= 2
BIN = $(VENV)/bin
# Python compiles what it imports; pip would compile every file of every package.
PIP = $(BIN)/python -m pip install --quiet --no-compile
# A crashed worker is not replaced: --dist loadfile then waits for it for ever. Files keep their order, in which the
# doctests, many and small, come last: a long file there would leave the other workers idle.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
STAMP = $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
comma = ,

.PHONY: demo test fast lint docs dist install torch clean

demo: install
	$(BIN)/backdoor-jax demo

test: install torch lint
	$(PYTEST)
	@$(BIN)/python -c "import torch" 2>/dev/null || \
	  echo "Not run: comparison with PyTorch, of which pip found no CPU build. To run it: make test EXTRAS=dev,torch"

# A build for CPUs alone, where pip finds one: the usual one for Linux brings gigabytes of CUDA.
torch: install
	@$(BIN)/python -c "import torch" 2>/dev/null || \
	  $(PIP) 'torch==2.13.0+cpu' >/dev/null 2>&1 || true

fast: install
	$(PYTEST) -m "not slow and not fuzz" tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site in docs/_build/html. Warnings are errors; notebooks are run.
docs:
	@$(MAKE) --no-print-directory EXTRAS=docs install torch
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -b html -q -W --keep-going docs docs/_build/html

# Wheel and source archive in dist/, each installed into an environment of its own and tried.
dist: install
	$(PIP) build
	rm -rf dist
	$(BIN)/python -m build --quiet
	for archive in dist/*; do \
	  rm -rf build/smoke && $(PYTHON) -m venv build/smoke && \
	  build/smoke/bin/python -m pip install --quiet --no-compile $$archive && \
	  (cd build && smoke/bin/backdoor-jax list >/dev/null && smoke/bin/python ../benchmarks/smoke.py) || exit 1; \
	done

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "backdoor_jax needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist docs/_build docs/api *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
