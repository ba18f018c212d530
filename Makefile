# Two commands do all the set-up on a fresh machine:
#   make demo   install, train on two processes, export ONNX and TensorRT, predict
#   make test   install, lint, check types and arrows, run the tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# With an NVIDIA GPU, TensorRT itself; without one, TensorRT-RTX, which builds engines ahead of time.
TENSORRT ?= $(if $(shell nvidia-smi -L 2>/dev/null),trt,rtx)
INSTALLED := $(VENV)/.installed-$(TENSORRT)

.PHONY: demo test install lint clean
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
	$(BIN)/pytest --numprocesses 2 --dist loadfile

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
