# Everything a checkout needs. `make demo` and `make test` are enough on a fresh machine.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# TORCH_INDEX=URL takes torch from another package index (for example one with CPU builds only).
TORCH_INDEX ?=
CONSTRAINTS := requirements/constraints.txt
STAMP := $(VENV)/.stamp

.PHONY: env dev demo test test-long reliability check docs docs-reference clean

env: $(STAMP)-run
dev: $(STAMP)-dev

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP)-torch: $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c $(CONSTRAINTS) $$(grep '^torch==' $(CONSTRAINTS))
	@touch $@

$(STAMP)-run: pyproject.toml $(STAMP)-torch
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e .
	@touch $@

$(STAMP)-dev: pyproject.toml $(STAMP)-torch
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@ $(STAMP)-run

demo: env
	$(BIN)/apollo-sft demo

test: dev
	$(BIN)/pytest -n 2 -m "not long"

test-long: dev
	$(BIN)/pytest -m long

# Every fault, the long tests too, and the tables of docs/reliability.md from what they recorded.
reliability: dev
	mkdir -p build && rm -f build/reliability.jsonl
	-APOLLO_RELIABILITY=$(CURDIR)/build/reliability.jsonl $(BIN)/pytest tests/faults
	$(BIN)/python -m tests.reliability build/reliability.jsonl

check: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# The site in build/site; a link that leads nowhere is an error.
docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# sft_trainer.yaml, and the part of docs/configuration.md that is made: both from the schema and the aliases.
docs-reference: dev
	$(BIN)/python -m apollo_sft.config.reference docs/configuration.md apollo_sft/config/sft_trainer.yaml

clean:
	rm -rf $(VENV) build dist *.egg-info
