# The two commands of the README: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format bench fuzz readme example clean

demo: $(READY)
	$(BIN)/python -m scripts.demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --durations 10

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY)
	$(BIN)/python -m bench

# The whole fuzzing campaign; the tests run a slice of it.
fuzz: $(READY)
	$(BIN)/python -W ignore -m tests.fuzz

# Puts the commands' real output into the README; a test compares the two.
readme: $(READY)
	$(BIN)/python -m scripts.readme

# Trains examples/tiny-lm again; takes some minutes and is not part of the tests.
example: $(READY)
	$(BIN)/python -m lab.tiny_lm

# One virtual environment for everything, made again when what it needs changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) .bench demo-out .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
