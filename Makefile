# Everything a contributor runs. `make` lists the targets; each installs what it needs into $(VENV), once.
#
#   PYTHON=python3.12     the interpreter that makes the virtual environment
#   VENV=.venv            where the environment lives
#   TORCH=torch==2.13.0   what `pip install` is asked for first; empty: whatever pip picks
#   TRL=1.16.0            the newest TRL, which the tests of the adapter run with; .ci/trl has the oldest
#   VERL=0.9.1            verl, for its formulas and the tests of the adapter
#   MARKS="not slow and not mutants"   which tests `make test` runs
#   JOBS=4                 processes of `make test`, each with whole files; one a core, at most four, if not given
#   PYTEST_ARGS="-x -k credit"         more for pytest
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRL ?= 1.16.0
VERL ?= 0.9.1
MARKS ?= not mutants
JOBS ?= auto
PYTEST_ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet
# What the native module and the list of dependencies are made of; Python files need no reinstallation.
BUILT_FROM := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
FORMATTED := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train compare test lint format bench vllm mutants clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.train ## train the arithmetic example with CAPO: warm start and 60 updates
	$(RUN) -m capo.cli train examples/arithmetic/capo.yaml

compare: $(VENV)/.train ## CAPO against GRPO on three seeds
	$(RUN) examples/arithmetic/compare.py

test: $(VENV)/.develop ## all tests but the mutants; MARKS="not slow and not mutants" is quicker
	$(VENV)/bin/pytest -m "$(MARKS)" -n $(JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.develop ## ruff, mypy, clang-format: report, change nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.develop ## rewrite Python and C++ files in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

bench: $(VENV)/.develop ## the benchmarks
	$(RUN) benchmarks/run.py

vllm: $(VENV)/.vllm ## rollouts, judge, server and a training with vLLM's build for CPUs, which is 2 GB to install
	$(VENV)/bin/pytest -m vllm $(PYTEST_ARGS)

mutants: $(VENV)/.develop ## plant faults in the kernels and see that tests notice each
	$(VENV)/bin/pytest -m mutants tests/test_mutants.py $(PYTEST_ARGS)

clean: ## remove the environment and everything built; runs/ stays
	rm -rf $(VENV) build dist *.egg-info capo/_native*.so .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

# PyTorch first and by its exact version, so that nothing later fetches another.
$(VENV)/.torch: $(VENV)/pyvenv.cfg
	$(if $(TORCH),$(PIP) $(TORCH))
	@touch $@

$(VENV)/.train: $(VENV)/.torch $(BUILT_FROM)
	$(PIP) -e '.[train]'
	@touch $@

$(VENV)/.vllm: $(VENV)/.develop .ci/vllm
	.ci/vllm $(RUN)
	@touch $@

# dashscope and llama-models are here for the tokenizer files in them; of verl's dependencies the tests need a part, of which
# Ray is the largest (80 MB to fetch).
$(VENV)/.develop: $(VENV)/.torch $(BUILT_FROM)
	$(PIP) -e '.[test,lint]'
	$(PIP) --no-deps dashscope llama-models
	$(PIP) trl==$(TRL) accelerate datasets peft $(TORCH)
	$(PIP) --no-deps verl==$(VERL) TransferQueue tensordict torchdata pyvers cloudpickle codetiming
	$(PIP) ray hydra-core aiohttp cachetools msgspec pyzmq prometheus_client
	@touch $(VENV)/.train $@
