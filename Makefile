# Everything a visitor needs: `make demo`, `make test`. Each makes .venv by itself, once; only Python >= 3.11 is needed.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# Tiny models gain nothing from threads: a worker of one thread for each of up to 8 cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile
DEMO := runs/demo

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check docs clean

help:
	@echo "make demo      the whole pipeline in a synthetic world, offline, within minutes; report in $(DEMO)/report.html"
	@echo "make test      the tests, but for the slow ones"
	@echo "make test-all  all tests"
	@echo "make check     ruff (rules and format), mypy, the examples in docstrings and docs, and the documentation site (strict)"
	@echo "make docs      the documentation site, in site/"
	@echo "make clean     deletes what these made, .venv and $(DEMO) included"

# torch goes first and alone: where an index offers several builds of it, nothing else may sway the choice.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, not {sys.version.split()[0]}: make ... PYTHON=python3.11")'
	@echo "installing into .venv (once; this can take minutes)"
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a venv; on Debian: apt install python3-venv"; exit 1; }
	@$(PIP) --upgrade pip
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@$(PIP) --group dev
	@touch $@

demo: .venv/.installed
	@$(BIN)/pharmacist demo --output-dir $(DEMO)
	@echo "open $(CURDIR)/$(DEMO)/report.html"

test: .venv/.installed-dev
	@$(PYTEST)

test-all: .venv/.installed-dev
	@$(PYTEST) -m ""

check: .venv/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@! grep -rnE '# fmt: (skip|off)' --include='*.py' benchmarks conftest.py docs examples recipes src tests
	@$(BIN)/mypy
	@$(PYTEST) -m "" --no-loadscope-reorder docs/tutorial.md docs/how-to docs README.md src  # the longest first
	@$(BIN)/mkdocs build --strict --quiet

docs: .venv/.installed-dev
	@$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site dist $(DEMO) .pytest_cache .mypy_cache .ruff_cache
