# Every target makes its own environment first. PYTHON picks the interpreter, VENV where the environment goes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-all lint clean

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tessera needs Python >= 3.11; this is " + sys.version)'
	@echo "making the environment in $(VENV) (once, about a minute) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python scripts/find_ticket.py --config=configs/lottery_digits.py --workdir=runs/demo-ticket
	$(BIN)/python scripts/train.py --config=configs/lm.py:tiny --workdir=runs/demo-lm

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) -m 'not gpu and not tpu'

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf .venv .venv-* .cache build *.egg-info
