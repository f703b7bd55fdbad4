# Commands of the repository. Every one sets up .venv first where it is missing; needs python3 >= 3.11 with pip and venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2

.PHONY: run test slow lint types bench

run: $(READY)  ## train a CartPole policy and show it
	$(BIN)/python -m experiments.rl $(ARGS)

test: $(READY)  ## the default test suite
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

slow: $(READY)  ## the tests the default suite leaves out
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not gpu" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)  ## time the engine against pure inference
	$(BIN)/python -m experiments.bench engine $(ARGS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "python >= 3.11 is needed, PYTHON=... chooses one"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@
