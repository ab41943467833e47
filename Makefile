# Two commands for newcomers: `make demo` (fine-tune and evaluate a real model) and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test test-all check docs format clean help

help:
	@echo "make demo   install, fine-tune the embedded model with config.yaml, evaluate it"
	@echo "make test   install, run the default tests (make test-all: the slow ones too)"
	@echo "make docs   write the reference pages, build the documentation's site into site/"
	@echo "make check  formatting, lint, types, direction of imports"

demo: $(VENV)/installed
	@if [ -d output ] && [ -n "$$(ls -A output)" ] && [ -z "$(ARGS)" ]; then \
	  echo "output/ holds an earlier run; replace it with: make demo ARGS=output.overwrite=true"; exit 2; fi
	$(BIN)/python src/finetune.py $(ARGS)
	$(BIN)/python src/evaluate.py
	@echo "Results: output/report.html (pictures), output/metrics.json, output/adapter/ (PEFT), output/sgm_finetuned.pth"

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not gpu and not network"

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/installed-dev
	$(BIN)/python -m sgm_finetune.base.reference docs/reference
	$(BIN)/python -m typer sgm_finetune.commands.cli utils docs --name sgm --output docs/reference/cli.md
	$(BIN)/python docs/layout.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q

format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml | $(VENV)/bin/python
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { \
	  echo "The embedded model's package builds llama.cpp: install a C++ compiler (apt-get install g++)"; exit 2; }
	$(BIN)/pip install --disable-pip-version-check -q torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .hypothesis .ruff_cache
