# `make help` lists the targets. Everything is set up on first use in $(VENV); nothing needs a GPU, a hub login or a server.
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# flwr needs other versions than the rest: it lives, and is tested, in an environment of its own.
FLOWER_VENV ?= .venv-flower
FLOWER_BIN := $(FLOWER_VENV)/bin
FLOWER_READY := $(FLOWER_VENV)/.ready
OUT := out/quickstart
# The first of these that is a working Python >= 3.11 with venv; `make PYTHON=/path/to/python` overrides it.
CANDIDATES := python3.11 python3 python3.12 python3.13 python3.14
WORKS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(WORKS)' >/dev/null 2>&1 && echo $$p && break; done)
# Tests and the quickstart never ask a hub for anything. Bytecode is kept, or each process compiles all of it again.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=
# What DeepSpeed compiles, once for all tests; without libaio there is nothing to compile, and what needs it is skipped.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/build/extensions
WORKERS ?= 2
ARGS ?=
# Tests of processes have both cores to themselves.
PROCESSES := tests/system tests/faults
GRIDS := $(PROCESSES:%=--ignore=%)
comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup setup-flower operators quickstart test test-system test-flower soak check bench bench-wire bench-tenants compare clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1 :/p' Makefile | awk -F ' : ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(READY)  ## create the virtual environment and install everything, once

setup-flower: $(FLOWER_READY)  ## the same for the extra `flower`, in an environment of its own

# install into environment, with constraints, what
define INSTALL
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv found; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1)
	@echo "installing into $(1) (about 2 GB; a few minutes the first time)"
	$(1)/bin/pip install --quiet --disable-pip-version-check -c $(2) -e '$(3)'
	@touch $@
endef

$(READY): pyproject.toml constraints.txt
	$(call INSTALL,$(VENV),constraints.txt,.[dev])

$(FLOWER_READY): pyproject.toml constraints-flower.txt
	$(call INSTALL,$(FLOWER_VENV),constraints-flower.txt,.[dev$(comma)flower])

quickstart: setup  ## the main job, offline: a split fine-tune, an adapter at the end
	rm -rf $(OUT)
	$(OFFLINE) $(BIN)/splitllm train recipes/quickstart.yaml --output-dir $(OUT)

test: setup  ## the fast tests
	$(OFFLINE) $(BIN)/pytest -q -m "not system and not soak" -n $(WORKERS) --dist worksteal $(ARGS)

operators test test-system soak: export CXX := $(CURDIR)/scripts/quick-g++
operators: setup  ## compile what DeepSpeed needs for files, once
	$(BIN)/python scripts/compile_operators.py

test-system: setup operators  ## the rest of the large grids; real processes and engines, one test after another
	$(OFFLINE) $(BIN)/pytest -q -m "system and not soak" -n $(WORKERS) --dist worksteal $(GRIDS) $(ARGS)
	$(OFFLINE) $(BIN)/pytest -q -m "system and not soak" --durations=20 $(PROCESSES) $(ARGS)

test-flower: setup-flower  ## real Flower processes between edges, and the wire beside Flower's versions
	$(OFFLINE) $(FLOWER_BIN)/pytest -q tests/federated/test_flower.py tests/wire/test_remote.py tests/test_cli.py $(ARGS)

soak: setup  ## the long runs
	$(OFFLINE) $(BIN)/pytest -q -m soak $(ARGS)

check: setup  ## lint, format, types, spelling, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/lint-imports

bench: setup  ## how fast a split run is
	$(OFFLINE) $(BIN)/python scripts/bench_split.py $(ARGS)

bench-wire: setup  ## what the wire costs
	$(OFFLINE) $(BIN)/python scripts/bench_wire.py $(ARGS)

bench-tenants: setup  ## what many clients of a server cost
	$(OFFLINE) $(BIN)/python scripts/bench_tenants.py $(ARGS)

compare: setup  ## centralised, federated, split and hierarchical, over ranks
	$(OFFLINE) $(BIN)/python scripts/compare_paradigms.py $(ARGS)

clean:  ## remove the virtual environment, the quickstart's output and caches
	rm -rf .venv .venv-flower $(OUT) build dist splitllm.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
