# The two commands of the README: `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINT := $(BIN)/ruff format --check && $(BIN)/ruff check && $(BIN)/lint-imports --no-logo && $(BIN)/mypy

.PHONY: demo test quick lint format bench fuzz readme example clean

demo: $(READY)
	$(BIN)/python -m scripts.demo

# Bytecode is kept whatever the environment says: the commands that tests start do not compile again.
test quick: export PYTHONDONTWRITEBYTECODE :=

# Lint runs beside the tests, and what it says comes after them; either of them fails both.
test: $(READY)
	@begin=$$(date +%s); said=$$(mktemp); \
	($(LINT)) >"$$said" 2>&1 & lint=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --durations 10; tests=$$?; \
	wait $$lint; linted=$$?; cat "$$said"; rm -f "$$said"; \
	echo "make test: $$(($$(date +%s) - $$begin)) s; tests ended with $$tests, lint with $$linted"; \
	[ $$tests -eq 0 ] && [ $$linted -eq 0 ]

# For while one works: the methods and what they are made of, without the five longest files, which
# take as long as all the others.
quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal --durations 10 \
		tests/checkpoint tests/engine tests/methods tests/names tests/plan tests/records \
		tests/run tests/storage \
		--ignore tests/methods/test_adding.py \
		--ignore tests/methods/covariance/test_command.py \
		--ignore tests/methods/covariance/test_reconstruct.py \
		--ignore tests/methods/salora/test_training.py \
		--ignore tests/plan/test_residual.py

lint: $(READY)
	$(LINT)

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
