# Everything a newcomer runs: `make demo`, `make test`, `make bench`. Each sets the machine up first, once.
VENV ?= .venv
PYTHON ?= python3
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: setup demo test lint types bench clean

setup: $(READY)

$(READY): pyproject.toml setup.sh
	VENV="$(VENV)" PYTHON="$(PYTHON)" sh ./setup.sh
	@touch $@

demo: $(READY)
	sh ./demo.sh $(BIN)/python runs/demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(READY)
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "$$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf "$(VENV)" runs/demo
