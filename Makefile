# Everything runs in .venv, which each target makes by itself, once, with the versions of constraints.txt.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin
comma := ,
# Liger's fused kernels run on a GPU only, so its package is installed where there is one.
EXTRAS := dev$(if $(shell command -v nvidia-smi),$(comma)gpu)
# Build requirements are pinned too. pip < 25.3 reads the first name for them, later ones the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# The tests run several processes; one thread each, or they fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
SLURM_PACKAGES := slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge

.DEFAULT_GOAL := help
.PHONY: help train test check format test-gpu parity lock clean lab-deps lab-up lab-down test-lab

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/.ready ## Train a small MoE on the Python standard library's source (a few minutes, no GPU needed)
	$(BIN)/moetrain train configs/python_stdlib.yaml

test: $(VENV)/.ready ## All tests that need no GPU
	$(PYTEST) -n 2 --dist loadfile -m 'not slow' tests/cpu tests/dist tests/faults tests/golden

check: $(VENV)/.ready ## Formatter, linter and type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready ## Format the code and apply the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: $(VENV)/.ready ## Tests on the GPUs of this machine
	$(PYTEST) tests/gpu

parity: $(VENV)/.ready ## Every supported family against plain Transformers on up to 8 ranks (slow)
	$(PYTEST) tests/dist/test_parity.py

lab-deps: ## Slurm and munge from the distribution's packages, for the lab (Debian, Ubuntu)
	$(SUDO) apt-get update --quiet
	$(SUDO) apt-get install --quiet --yes --no-install-recommends $(SLURM_PACKAGES)

lab-up: $(VENV)/.ready ## Start a Slurm of 16 nodes on this machine, in .lab
	$(BIN)/python -m cluster.lab up

lab-down: $(VENV)/.ready ## Stop it
	$(BIN)/python -m cluster.lab down

test-lab: $(VENV)/.ready ## All tests on the lab: `make test` has the short ones (slow)
	$(PYTEST) tests/dist/test_lab.py tests/faults/test_lab.py

lock: ## Resolve all dependencies anew and rewrite constraints.txt
	rm -rf .lock && $(PYTHON) -m venv .lock
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT .lock/bin/pip install --quiet --dry-run --ignore-installed \
	    --report .lock/report.json '.[dev,gpu]' setuptools torch==$(TORCH)
	.lock/bin/python -c 'import json; \
	    found = [item["metadata"] for item in json.load(open(".lock/report.json"))["install"]]; \
	    pins = {m["name"].lower().replace("_", "-"): m["version"].split("+")[0] for m in found}; \
	    pins.pop("moetrain"); \
	    print("# Written by `make lock`: every package of the environment. What only CUDA builds of torch need is in it too.",\
	        *(f"{name}=={pins[name]}" for name in sorted(pins)), sep="\n")' > .lock/constraints.txt
	mv .lock/constraints.txt constraints.txt && rm -rf .lock

clean: ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .lock .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "moetrain needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
	    || { echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Making the environment in $(VENV); this happens once and takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@
