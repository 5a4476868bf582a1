# `make run` and `make test` set up everything they need: a virtual environment in .venv, the dependencies (llama.cpp
# is compiled once, which takes minutes; cmake and ninja come along) and the default model.

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUESTION ?= At what water level does the station send the red alarm?
SERVE_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?= elastic
BENCH_VLLM_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help run ask test test-vllm lint format bench bench-vllm setup clean

help:  ## Show what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	    printf '%-15s %s\n' "$$name" "$$text"; done

run: $(READY)  ## Serve the default model behind OpenAI's API until Ctrl-C; SERVE_ARGS adds options
	$(BIN)/kvpsi serve $(SERVE_ARGS)

ask: $(READY)  ## Ask it a QUESTION about a long document, without a server
	$(BIN)/kvpsi generate --file examples/long_document.txt "$(QUESTION)"

test: $(READY)  ## Run all tests, one after the other: llama.cpp's threads spin and would slow each other down
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.ready  ## Run the tests with real vLLM, which sets up an environment of its own (4 GB)
	$(VLLM_VENV)/bin/python -m pytest -p no:cacheprovider -s tests_vllm $(PYTEST_ARGS)

lint: $(READY)  ## Check style and types, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Bring the code into the common format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## Run the measurements; BENCH_ARGS chooses which
	$(BIN)/kvpsi bench $(BENCH_ARGS)

bench-vllm: $(VLLM_VENV)/.ready  ## Measure a governed vLLM beside stock vLLM, in the environment of its tests
	$(VLLM_VENV)/bin/kvpsi bench vllm $(BENCH_VLLM_ARGS)

setup: $(READY)  ## Only set up .venv and the default model

define CHECK_PYTHON
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "kvpsi needs Python 3.10 or newer: call make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "Python's venv module is missing: run 'apt install python3-venv' as root." >&2; exit 1; }
endef

$(READY): pyproject.toml
	$(CHECK_PYTHON)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	    echo "A C++ compiler is missing: run 'apt install g++' as root." >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[serve]' --group dev
	$(BIN)/kvpsi pull
	@touch $@

$(VLLM_VENV)/.ready: tests_vllm/requirements.txt pyproject.toml
	$(CHECK_PYTHON)
	@test -x $(VLLM_VENV)/bin/python && $(VLLM_VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps "$$(grep '^torch==' $<)" || { \
	    echo "pip does not find PyTorch's build for processors: set PIP_EXTRA_INDEX_URL to the index that PyTorch's" \
	    "page for installing names for CPU." >&2; exit 1; }
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --requirement $<
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

clean:  ## Remove the virtual environment and everything built; models stay in the user's cache
	rm -rf $(VENV) $(VLLM_VENV) build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find src tests tests_vllm -name __pycache__ -type d -prune -exec rm -rf {} +
