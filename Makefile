# Everything runs in .venv, which each target makes by itself, once, with the versions of constraints.txt.
PYTHON ?= python3
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
MONITOR_PACKAGES := prometheus prometheus-alertmanager chromium
# Faults of the simulated cluster, with the second in which each begins; `--help` lists them.
DEMO ?= --fault straggler@60 --fault dead-expert@60 --fault memory@120 --fault xid@180
# Images: TARGET=gpu|cpu, ENGINE=docker|podman|buildah (found by itself), ENGINE_ARGS for the engine's build command.
TARGET ?= gpu
IMAGE ?= moetrain:$(TARGET)
IMAGE_FILES := build/moetrain-$(TARGET)

.DEFAULT_GOAL := help
.PHONY: help train test check format test-gpu parity lock clean lab-deps lab-up lab-down test-lab \
    monitor-deps monitor demo-cluster dashboards test-monitor \
    image sqsh sbom image-check versions-check test-image

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

monitor-deps: ## Prometheus, Alertmanager and Chromium from the distribution's packages (Debian, Ubuntu)
	$(SUDO) apt-get update --quiet
	$(SUDO) apt-get install --quiet --yes --no-install-recommends $(MONITOR_PACKAGES)

monitor: $(VENV)/.ready ## Watch the runs below runs/: Prometheus, Alertmanager, Grafana if it is here, until Ctrl-C
	$(BIN)/python -m monitoring.stack

demo-cluster: $(VENV)/.ready ## 128 simulated ranks for `make monitor` to watch, with the faults in DEMO, until Ctrl-C
	$(BIN)/python -m monitoring.demo $(DEMO)

dashboards: $(VENV)/.ready ## Write the dashboards' JSON from their code
	$(BIN)/python -m monitoring.dashboards

test-monitor: $(VENV)/.ready ## Every fault raises its alert and clears, a real run is watched (slow)
	$(PYTEST) tests/faults/test_monitoring.py tests/dist/test_monitoring_live.py

image: $(VENV)/.ready ## Build the container image (TARGET=gpu|cpu, ENGINE=docker|podman|buildah)
	$(BIN)/python -m containers.build image $(TARGET) --tag $(IMAGE) --engine '$(ENGINE)' -- $(ENGINE_ARGS)

sqsh: $(VENV)/.ready ## Turn the image into one file for enroot and pyxis, with its hash beside it
	$(BIN)/python -m containers.build sqsh $(IMAGE) $(IMAGE_FILES).sqsh --engine '$(ENGINE)'

sbom: $(VENV)/.ready ## Bill of materials from the lock; with FROM_IMAGE=1 of what is in the image
	$(BIN)/python -m containers.sbom $(TARGET) $(IMAGE_FILES).cdx.json --engine '$(ENGINE)' $(if $(FROM_IMAGE),--image $(IMAGE))

image-check: versions-check ## Check the Dockerfiles: versions, then hadolint where it is installed
	@if command -v hadolint > /dev/null; then hadolint containers/Dockerfile containers/Dockerfile.cpu; \
	else echo "hadolint is not installed, so it did not run; it is one binary: github.com/hadolint/hadolint, releases"; fi

versions-check: $(VENV)/.ready ## Everything that names a version agrees with containers/versions.lock
	$(BIN)/python -m containers.check

test-image: $(VENV)/.ready ## Build the CPU image without a registry, run tests in it, squash it (slow; root, buildah, mmdebstrap)
	$(PYTEST) tests/faults/test_image.py

lock: $(VENV)/.ready ## Resolve all dependencies anew and rewrite containers/versions.lock and constraints.txt
	env -u PIP_CONSTRAINT -u PIP_BUILD_CONSTRAINT $(BIN)/python -m containers.resolve

clean: ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
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
