# memodb: every target works on a clean clone; the first one used builds .venv.
#
#   make demo    the main job on real input        (DEMO_ARGS="--model DIR --data FILE.tsv")
#   make test    the test suite                    (PYTEST_ARGS="-k search -x")
#   make torture     crashes, faults, damage, limits, concurrency, fuzzing (MINUTES=30)
#   make dax-test    the same on a DAX mount, in a virtual machine: 5 minutes, as root (docs/dax.md)
#   make powercut CUTS=20    the power goes while stores are written, in a virtual machine: half an hour, as root
#   make check   style, types, room rules, wheel
#   make audit   known vulnerabilities of what is installed (needs a network)
#   make bench   benchmarks, half an hour and more (BENCH_ARGS=benchmarks/test_put.py)
#   make bench-quick    a subset, 3 minutes
#   make bench-report   their results as docs/performance.md
#   make paper   every table and figure of the AttMemo paper, hours; goes on where it stopped (docs/paper.md)
#   make paper-quick    a little of each of them, a quarter of an hour
#   make clean   remove what the above made

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=
CUTS ?= 20
POWERCUT_ARGS ?=
BENCH_ARGS ?= benchmarks
MINUTES ?= 30
PAPER_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH = $(BIN)/python -m pytest -q --benchmark-columns=median,iqr,rounds --benchmark-sort=min $(BENCH_ARGS)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test torture dax-test powercut check audit bench bench-quick bench-report paper paper-quick clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -16

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

torture: $(READY)
	$(BIN)/python tests/reliability/torture.py --minutes $(MINUTES) $(TORTURE_ARGS)

dax-test: $(READY)
	$(BIN)/python tests/dax/run.py

powercut: $(READY)
	$(BIN)/python tests/powercut/run.py --cuts $(CUTS) $(POWERCUT_ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict memodb integrations demo
	$(BIN)/lint-imports
	$(BIN)/python .ci/check_code.py
	$(BIN)/python .ci/check_wheel.py

audit: $(READY)
	$(BIN)/python .ci/audit.py

bench: $(READY)
	MEMODB_BENCH=full $(BENCH)

bench-quick: $(READY)
	MEMODB_BENCH=quick $(BENCH)

bench-report: $(READY)
	$(BIN)/python -m benchmarks.report

paper: $(READY)
	$(BIN)/python -m benchmarks.paper $(PAPER_ARGS)

paper-quick: $(READY)
	$(BIN)/python -m benchmarks.paper --quick $(PAPER_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
