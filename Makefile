# `make help` lists the targets. Everything runs in .venv, which the first target makes and later ones reuse.
MODEL ?= small
VENV ?= .venv
PYTHON := $(VENV)/bin/python
LOCK := scripts/dev.lock

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow lint check clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv with the tested package set

$(VENV)/.installed: $(LOCK) setup.cfg scripts/install.sh
	@scripts/install.sh $(VENV) $(LOCK)
	@touch $@

demo: install ## train a DoRA adapter on shipped rows and show what it learned (MODEL=smollm2 for a real 135M model)
	@$(PYTHON) scripts/demo.py --model=$(MODEL)

test: install ## run the default test suite
	@$(PYTHON) -m pytest

test-slow: install ## run the slow tests as well
	@$(PYTHON) -m pytest -m "not gpu"

lint: install ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

check: lint test ## lint and test

clean: ## remove what runs and tools left behind, not .venv
	@rm -rf output outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
