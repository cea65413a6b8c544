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
	$(BIN)/python data_prep/make_scenes.py --out runs/demo/scenes --images 200
	$(BIN)/python examples/two_views.py --out runs/demo
	$(BIN)/python examples/boxes_and_regions.py --out runs/demo
	$(BIN)/python examples/in_your_own_code.py
	$(BIN)/geoaug inspect runs/demo/scenes/instances.json --preset scrl --out runs/demo/inspect
	$(BIN)/geoaug stats --preset scrl --data runs/demo/scenes
	@echo "demo: pictures in runs/demo, a page to open in runs/demo/inspect/inspect.html"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest

bench: $(READY)
	@for script in $$(grep -l __main__ benchmarks/*.py); do echo "$$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf "$(VENV)" runs/demo
