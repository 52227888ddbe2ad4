# Every target works from a fresh clone: what it needs is installed into .venv (and .venv-petals) first.
SHELL  := /bin/bash
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3),python3)
VENV   ?= .venv
PEER   ?= .venv-petals
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

export TORCH ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup peer-venv run test test-fast bench lint format deb clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: ## install everything into .venv (TORCH=cpu|cuda|auto)
	@$(PYTHON) packaging/setup_venv.py agent $(VENV)

peer-venv: ## install the published Petals into .venv-petals, for interop tests and benchmarks
	@$(PYTHON) packaging/setup_venv.py peer $(PEER)

run: setup ## the demo: a private swarm on this host generates text (ARGS=--once ends after it)
	@$(BIN)/petals-agent demo $(ARGS)

test: setup peer-venv lint ## lint, types and all tests, with those against the published Petals
	$(PYTEST) $(ARGS)

test-fast: setup ## the tests that need no published Petals and boot no machine
	$(PYTEST) -m "not interop and not e2e" $(ARGS)

bench: setup peer-venv ## ours beside the published Petals and in-process transformers (ARGS=--json, --quick)
	@$(BIN)/python tests/benchmarks/serve.py $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

deb: ## the Debian packages, agent and monitor, into dist/ (TORCH=cuda: with CUDA libraries)
	@packaging/build_deb.sh

clean: ## remove the environments and all caches
	rm -rf $(VENV) $(PEER) build dist agent/*.egg-info *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find agent plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
