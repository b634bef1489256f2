# Everything a fresh machine needs is Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install lint types unit clean

demo: install  ## race five optimizers on embedded data
	$(BIN)/truestep race --out truestep-demo

test: install lint types unit  ## lint, types and the whole test suite

install: .venv/installed  ## make .venv with pinned versions

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "truestep needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[lab,dev,lightning,huggingface]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/pytest -n auto --dist worksteal --cov --cov-report=term

clean:
	rm -rf .venv truestep-demo
