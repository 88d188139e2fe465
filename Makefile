# Every target sets up what it needs. VENV names the virtual environment; PYTHON the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo quality test test-oldest lint clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## a virtual environment with the package and its development tools

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup  ## ask a drawn scene three questions, unpruned beside pruned, and draw what was kept
	$(RUN)/python -m examples.demo

quality: setup  ## evaluate MODEL=folder on held-out questions of the drawn world
	@test -n "$(MODEL)" || { echo "make quality MODEL=folder" >&2; exit 1; }
	$(RUN)/python -m benchmarks.quality.evaluate_quality --model $(MODEL) --out benchmarks/results

test: setup  ## all tests
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile

test-oldest:  ## all tests with the oldest supported transformers and torch
	PIP_CONSTRAINT=$(CURDIR)/tests/oldest.txt $(MAKE) test VENV=.venv-oldest

lint: setup  ## style and types
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

clean:  ## remove environments and outputs
	rm -rf .venv .venv-ci .venv-oldest out build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
