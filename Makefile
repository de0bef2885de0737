# Two commands do all the set-up on a machine with Python 3.11+ and make: `make demo` and `make test`.
# Another interpreter: make test PYTHON=python3.12. Another place for the results: make demo OUT=/some/folder.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := biorewards/assets/demo

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: help install demo cards test test-all lint clean

help:
	@echo "make demo      score the bundled images; tables and reports go to $(OUT)/"
	@echo "make test      lint, types and the quick tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      ruff and mypy alone"
	@echo "make cards     audit the bundled verifiers; their cards go to docs/cards/"
	@echo "make clean     remove $(VENV), $(OUT) and caches"

install: $(STAMP)

# The stamp is newer than what it was made from: a second `make` installs nothing.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "biorewards needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	  echo "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Installing into $(VENV) (the first time takes minutes: torch is large) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Tables are laid out for 140 columns where nobody has said how wide the terminal is.
demo: export COLUMNS ?= 140
demo: $(STAMP)
	@mkdir -p $(OUT)
	@echo; echo "== 1. Drawn cells: treated, control, copies of a control, noise, blank =="
	$(BIN)/biorewards score $(DEMO)/phantom --assay phantom --out $(OUT)/phantom.csv --report $(OUT)/phantom.html
	@echo; echo "== 2. The same table by kind of row =="
	$(BIN)/python scripts/table_by_kind.py $(OUT)/phantom.csv
	@echo; echo "== 3. Real cells without labels: JUMP U2OS crops =="
	$(BIN)/biorewards score $(DEMO)/jump --assay bbbc021 --out $(OUT)/jump.csv --report $(OUT)/jump.html
	@echo; echo "== 4. Their masks =="
	$(BIN)/biorewards segment $(DEMO)/jump --nucleus-channel 2 --cell-channel 0,1 --out $(OUT)/jump-masks --overlay
	@echo; echo "Written:"
	@ls -1 $(OUT)/*.csv $(OUT)/*.html | sed 's/^/  /'
	@echo "  $(OUT)/jump-masks/ (label images and overlays)"
	@echo "Open $(OUT)/phantom.html in a browser."

# Real crops (CARDS_DATA) have no open licence and do not come with the package; without them only phantom is audited.
CARDS_DATA ?= ../shared/data
cards: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python scripts/cards.py --out docs/cards --data $(CARDS_DATA)

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

test: lint
	$(BIN)/python -m pytest -q -m "not slow" $(PYTEST_ARGS)

test-all: lint
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(OUT) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
