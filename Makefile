# `make demo`, `make test` and `make test-quick` install the package into .venv first, unless this has been done already.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-quick lint types check gpu-check setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python train_like_eval.py test --config configs/demo.yaml

# Runs one process per core with one thread each. Tests of a file share fixtures and run in the same process. Files with slow tests
# come first (tests/conftest.py).
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

# Leaves out the tests that start processes or take several seconds each.
test-quick: $(READY)
	$(PYTEST) -m "not slow"

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
