# The README's commands. `make setup` needs Python 3.11 to 3.13; everything else runs in the .venv that it makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test lint clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch "scikit-build-core>=0.11" ninja
	$(BIN)/pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/pretrain_phased_dmd.sh
	$(BIN)/python -m megatron_pdmd.evaluation.run_report runs/quickstart

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist runs
