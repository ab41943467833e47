# Two commands for newcomers: `make demo` (fine-tune and evaluate a real model) and `make test`.
# With uv: make test INSTALL="uv pip install --python .venv/bin/python --torch-backend=auto"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --use-pep517: the pip of Debian 12 (23.0) otherwise fails to build seqeval, which has no wheel
INSTALL ?= $(BIN)/python -m pip install --disable-pip-version-check --use-pep517
ARGS ?=
# what waits for a GPU runs in the environment if there is one, else in the Python that the machine has
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: demo test test-all test-oldest check docs format lock gpu gpu-pack gpu-publish clean help

help:
	@echo "make demo   install, fine-tune the embedded model with config.yaml, evaluate it"
	@echo "make test   install, run the default tests (make test-all: the slow ones too)"
	@echo "make test-oldest  the default tests with the oldest versions that pyproject.toml accepts, in an environment of their own"
	@echo "make docs   write the reference pages, build the documentation's site into site/"
	@echo "make check  formatting, lint, types, direction of imports"
	@echo "make gpu    what waits for a GPU, most valuable first (ARGS=--list shows it, ARGS=--pico tries it on a CPU)"

demo: $(VENV)/installed
	@if [ -d output ] && [ -n "$$(ls -A output)" ] && [ -z "$(ARGS)" ]; then \
	  echo "output/ holds an earlier run; replace it with: make demo ARGS=output.overwrite=true"; exit 2; fi
	$(BIN)/python src/finetune.py $(ARGS)
	@echo "The run has tested the model on all test examples; 64 of them check the saved result"
	$(BIN)/python src/evaluate.py data.num_test=64
	@echo "Results: output/report.html (pictures), output/metrics.json, output/adapter/ (PEFT), output/sgm_finetuned.pth"

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-all
	$(BIN)/python -m pytest -m "not gpu and not network"

# -W: the oldest versions use what newer packages below them call deprecated, and leave files to be closed by Python
test-oldest: $(VENV)-oldest/installed
	$(VENV)-oldest/bin/python -m pytest -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning -W ignore::FutureWarning -W ignore::ResourceWarning $(ARGS)

check: $(VENV)/installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/installed-docs
	$(BIN)/python -m sgm_finetune.base.reference docs/reference
	$(BIN)/python -m typer sgm_finetune.commands.cli utils docs --name sgm --output docs/reference/cli.md
	$(BIN)/python docs/layout.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q

# Installs nothing: docs/gpu.md
gpu:
	$(GPU_PYTHON) benchmarks/gpu/run.py $(ARGS)

gpu-pack: $(VENV)/installed
	$(BIN)/python benchmarks/gpu/pack.py $(ARGS)

gpu-publish: $(VENV)/installed
	$(BIN)/python benchmarks/gpu/publish.py $(ARGS)

format: $(VENV)/installed-check
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The newest version of every package within pyproject.toml's bounds, for every platform; it has no hosts and no hashes, so that
# pip and uv take the packages from the user's own index or mirror. CUDA's packages are left out: each build of torch asks for its own.
lock:
	@: > requirements/lock.txt
	uv pip compile requirements/all.txt --universal --python-version 3.11.5 --no-annotate --no-emit-package sgm-finetune \
	  --custom-compile-command "make lock" --output-file requirements/lock.txt
	sed -i -E '/^(cuda|nvidia)-/d' requirements/lock.txt

$(VENV)/bin/python:
	@echo "Making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt requirements/lock.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing SGM with torch and the demo's packages into $(VENV), without compiling: 2 GB with torch for the CPU, 6 GB with CUDA; 1 to 4 minutes"
	$(INSTALL) -r requirements.txt
	@touch $@

$(VENV)/installed-%: requirements/%.txt $(VENV)/installed
	@echo "Installing what requirements/$*.txt adds"
	$(INSTALL) -r requirements/$*.txt
	@touch $@

$(VENV)-oldest/installed: requirements/oldest.txt pyproject.toml
	@echo "Installing the oldest versions that SGM accepts into $(VENV)-oldest: another 2 GB"
	@$(PYTHON) -m venv $(VENV)-oldest
	$(subst $(VENV)/,$(VENV)-oldest/,$(INSTALL)) -r requirements/oldest.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest .pytest_cache .hypothesis .ruff_cache
