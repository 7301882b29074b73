PYTHON ?= python3
PYTEST_FLAGS ?= -n auto --maxprocesses 4 --dist worksteal

SHELL := bash
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip installs the package without the native library, which "make native" builds in place.
export GOOGLENET_FUSED_BUILD ?= none

# pip in two halves around its arguments. The second names each large file on its way; pip's errors and warnings pass, but for one
# that only says that a folder in the user's own pip configuration lacks a package.
PIP_INSTALL := set -o pipefail; $(BIN)/python -m pip install --no-input --progress-bar off --no-build-isolation -c constraints.txt
SHOW_FILES := 2> >(grep -v "^WARNING: Location .* is ignored" >&2) | sed -un -E \
	-e 's~^ *(Downloading|Using cached) ([^ ]*/)?([^ /]+) (\([0-9.]+ [MG]B\)).*~    \3 \4~p' -e 's~^Installing collected.*~    unpacking~p'

.PHONY: help install native demo test lint audit bench clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed ## make .venv with the package and all that demo, test and lint need
	@echo "ready: $(BIN)/googlenet-fused"

demo: .venv/.installed ## plain against fused GoogLeNet on real photographs; report and chart in demo-output/
	@$(BIN)/googlenet-fused demo --output demo-output

native: .venv/.installed ## build in place what the compilers here can: the CUDA library, and the simulation of its kernels (minutes)
	@$(BIN)/python csrc/build.py cuda --if-possible
	@$(BIN)/python csrc/build.py sim --if-possible

test: native ## the tests but those that take minutes each, which --extra adds (PYTEST_FLAGS="-k name" runs some, in one process)
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: .venv/.installed ## ruff, mypy, the import direction, and the tables generated from the benchmarks
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_import_direction.py
	@$(BIN)/python -m benchmarks.report --check

audit: native ## compile the GPU kernels for every architecture, without a GPU, and check what they became (a quarter of an hour on two cores)
	@$(BIN)/python -m benchmarks.audit; triton=$$?; (( triton < 128 )) || exit $$triton; \
		$(BIN)/python -m benchmarks.audit.cuda --if-possible && exit $$triton

bench: .venv/.installed-bench ## measure on this machine (the better part of an hour on two cores) and write the tables and charts
	@$(BIN)/python -m benchmarks.run
	@$(BIN)/python -m benchmarks.report

clean: ## remove .venv and all that the other targets wrote, but no measurements
	@rm -rf .venv build dist ./*.egg-info demo-output gpu-output train-output benchmarks/probes/build .pytest_cache .mypy_cache .ruff_cache
	@rm -f $(addprefix googlenet_fused/backends/cuda/,*.so build.json _host_sim.json)
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: there is no $(PYTHON); install Python 3.11 or later, or name one: make install PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python " + sys.version.split()[0] \
		+ "; 3.11 or later is needed, name one: make install PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) lacks venv or pip; install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "==> .venv"
	@$(PYTHON) -m venv --clear .venv

.venv/.installed: pyproject.toml constraints.txt setup.py | .venv/bin/pip
	@echo "==> the package, PyTorch and the tools (several GB to fetch the first time)"
	@$(PIP_INSTALL) --quiet setuptools
	@$(PIP_INSTALL) -e '.[tools,parquet,train,dev]' $(SHOW_FILES)
	@touch $@

.venv/.installed-bench: .venv/.installed
	@echo "==> ONNX Runtime and OpenVINO"
	@$(PIP_INSTALL) -e '.[bench]' $(SHOW_FILES)
	@touch $@
