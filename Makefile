# make quickstart   fine-tune the embedded model on drawn cards
# make test         run all tests
# make test-quick   run the tests that take less than ten seconds each
# make test-faults  kill training fifty times, at random moments and inside saves
# make lint         check style and types
# make docs         build the documentation site in site/, strictly and offline
# make clean        remove the environment and all results

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in a process for each core, in at most four: each of them holds libraries and models.
IN_PARALLEL := -n logical --maxprocesses 4 --dist worksteal
SOURCES := $(shell find idefics_qlora -type f -not -path '*/__pycache__/*')

.PHONY: quickstart test test-quick test-faults lint docs clean

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/installed
	$(BIN)/pytest $(IN_PARALLEL)

test-quick: $(VENV)/installed
	$(BIN)/pytest $(IN_PARALLEL) -m "not slow"

test-faults: $(VENV)/installed
	$(BIN)/pytest tests/training/test_faults.py --kills 50

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache runs site

# The dependencies, once; torch and torchvision together, at versions known to work.
$(VENV)/dependencies: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ".[dev]"
	touch $@

# The package itself, as a user gets it, again after every change.
$(VENV)/installed: $(VENV)/dependencies $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall .
	rm -rf build *.egg-info
	touch $@
