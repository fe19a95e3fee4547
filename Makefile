# `make demo` and `make test` install the package into .venv first, unless this has been done already.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types check gpu-check setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python train_like_eval.py test --config configs/demo.yaml

# Runs one process per core with one thread each. Tests of a file share fixtures and run in the same process.
test: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

# Tests and measures the package on a GPU within eight minutes. The report is written to gpu-check/.
gpu-check: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python tools/gpu_check.py --out gpu-check

clean:
	rm -rf $(VENV) build dist *.egg-info
