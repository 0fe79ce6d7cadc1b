# make demo   the whole loop on the miniature world, then the path of its report
# make test   lint, formatting, types and tests
# make docs   write docs/api.md from the docstrings again
# make page   types of the studio's JavaScript (jsconfig.json): TypeScript by npx, so node and a network
# make base   train the miniature's Base checkpoint again, into runs/base
#
# The first of them installs into .venv; later ones need no network. PYTHON=/path/to/python3 chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test docs page base
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/gristmill run miniature

# One thread a worker: two workers with two threads each only get in each other's way on two cores.
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

docs: $(INSTALLED)
	$(BIN)/python docs/make_api.py

page:
	npx --yes --package typescript@7.0.2 tsc --project jsconfig.json

base: $(INSTALLED)
	$(BIN)/gristmill pretrain miniature-base --out runs/base

# The stamp is written last, so a broken install is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gristmill needs Python 3.11 or newer, and '$(PYTHON)' is not that: install one, then run make PYTHON=/path/to/it." >&2; exit 1; }
	@echo "Installing into .venv (only the first time; torch is large)."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
