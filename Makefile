# Thin names over the tools. Each target makes .venv and installs what it needs; a second call is quick.
#
#   make demo                     the main job on real images, and its report
#   make test | lint | bench | docs
#   make demo PYTHON=python3.12   another interpreter (3.10 to 3.13) for .venv
#   make demo DEMO=config.SEED_VALUE=1 DEMO_DIR=runs/demo_seed1           further overrides, another folder
#   make demo PIP_ARGS=...        further arguments for pip (another index, --constraint constraints.txt)

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
DEMO ?=
DEMO_DIR ?= runs/demo
PYTEST_ARGS ?=
TEST_PROCESSES ?= 3

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
PACKAGING := setup.py pyproject.toml

.PHONY: help demo test lint bench docs clean network-tools
.DEFAULT_GOAL := help

help:
	@sed -n '3,7s/^# //p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/vissl-like config=pretrain/clusterfit/clusterfit_mnist5k config.RUN.DIR=$(DEMO_DIR) $(DEMO)
	@echo "The report, for a browser: $(CURDIR)/$(DEMO_DIR)/report.html"

# The files that wait most and last longest come first, so that short ones fill the end; as many tests wait for other
# processes, there is one process more than two cores. Compiled modules are kept: tests start many interpreters.
test: $(VENV)/.installed-dev network-tools
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest tests/integration tests/unit tests/numerics \
	  --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --cov --cov-report=term --durations=10 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/make_docs.py --check

bench: $(VENV)/.installed-dev
	@missed=; for file in $(wildcard benchmarks/[!_]*.py); do echo "== $$file"; began=$$(date +%s); \
	  $(BIN)/python $$file || missed="$$missed $$file"; echo "== $$file: $$(($$(date +%s) - began)) s"; done; \
	  [ -z "$$missed" ] || { echo "== failed or missed a bar:$$missed"; exit 1; }

docs: $(VENV)/.installed-demo
	$(BIN)/python tools/make_docs.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

# `ip` makes the networks of tests/integration/test_nodes.py; where it cannot be had, they are skipped with the reason.
network-tools:
	@if ! command -v ip >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { timeout 120 apt-get update && timeout 120 apt-get install --yes --no-install-recommends iproute2; } \
	    >/dev/null 2>&1 || true; fi

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no '$(PYTHON)' on this machine. Install Python 3.10 to 3.13 (Debian, Ubuntu: apt install python3 python3-venv)"; \
	  echo "      or name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "make: $$($(PYTHON) --version 2>&1) does not fit; vissl_like runs on Python 3.10 to 3.13."; \
	  echo "      Name one of these: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) cannot create virtual environments: its package 'venv' is missing."; \
	  echo "      Debian, Ubuntu: apt install python3-venv   (then run make again)"; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) --upgrade pip

$(VENV)/.installed-demo: $(PACKAGING) | $(BIN)/python
	@echo "Installing into $(VENV). The first time takes some minutes: PyTorch alone is several GB (see docs/start.md)."
	@$(INSTALL) --editable '.[demo,tb]'
	@touch $@

$(VENV)/.installed-dev: $(PACKAGING) | $(BIN)/python
	@echo "Installing into $(VENV), with the tools for tests. The first time takes some minutes."
	@$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed-demo
