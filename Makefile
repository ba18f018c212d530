# Two commands do all the set-up on a fresh machine, and one is for every change:
#   make demo    install, train on two processes, export ONNX and TensorRT, predict, report
#   make test    install, lint, check types and imports, run all tests
#   make check   the same without the slow tests: about 2 minutes

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# With an NVIDIA GPU, TensorRT itself; without one, TensorRT-RTX, which builds engines ahead of time.
TENSORRT ?= $(if $(shell nvidia-smi -L 2>/dev/null),trt,rtx)
INSTALLED := $(VENV)/.installed-$(TENSORRT)

# Four files at a time: many tests wait. Each computes with one thread, and files with slow tests come first, so that
# the workers end together (tests/conftest.py). Memory that a tensor frees stays with its process (glibc): to get it
# anew from the kernel each time is a tenth of what the larger networks take.
PYTEST := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 $(BIN)/pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

# Hundreds of processes import the same files: without Python's bytecode each would compile them again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check install lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[train,$(TENSORRT),dev]'
	@touch $@

install: $(INSTALLED)

demo: install
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/demo.sh

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $$(git ls-files '*.sh' '*.sbatch' .ci/run)
	$(BIN)/yamllint --strict $$(git ls-files '*.yml' '*.yaml')
	$(BIN)/hadolint $$(git ls-files '*Dockerfile')

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
