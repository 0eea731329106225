# memodb: every target works on a clean clone; the first one used builds .venv.
#
#   make demo    the main job on real input        (DEMO_ARGS="--model DIR --data FILE.tsv")
#   make test    the test suite                    (PYTEST_ARGS="-k search -x")
#   make check   style, types, room rules, wheel
#   make bench   benchmarks                        (BENCH_ARGS="-k gather")
#   make clean   remove what the above made

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

# A half-made environment is never taken for a ready one: the stamp is written last.
$(READY): pyproject.toml constraints.txt
	@rm -f $@
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 14) else "memodb needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --progress-bar=off --constraint constraints.txt --editable '.[torch,transformers,bench,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m demo $(DEMO_ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict memodb integrations demo
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_wheel.py

bench: $(READY)
	$(BIN)/python -m pytest benchmarks $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
