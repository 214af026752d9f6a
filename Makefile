# Every target brings what it needs: a virtual environment in .venv, and one for the stub generator in .venv-proto.
# Variables: PYTHON, the interpreter to start from (3.11 or newer); ARGS, more arguments for demo, test, bench and soak;
# MINUTES, how long to soak; WORKERS, processes that make test divides the tests among (0: none, as a debugger needs).

PYTHON ?= python3
ARGS ?=
MINUTES ?= 30
WORKERS ?= 4
BIN := .venv/bin
PROTO := .venv-proto/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow soak check format bench proto vectors clean

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

setup: .venv/.tools .venv-proto/.ready ## install everything for development
	@echo "ready: $(BIN)/equipoise --help"

demo: .venv/.runtime ## watch a training job learn better, its server killed half-way
	@$(BIN)/equipoise demo $(ARGS)

test test-slow: export PYTHONDONTWRITEBYTECODE :=  # else each process compiles the tests and all that it imports
test: .venv/.tests .venv-proto/.ready ## the tests, but for the slow ones
	$(BIN)/pytest -m "not slow" --numprocesses $(WORKERS) --dist worksteal $(ARGS)

test-slow: .venv/.tests .venv-proto/.ready ## the slow tests
	$(BIN)/pytest -m slow $(ARGS) || [ $$? -eq 5 ]  # 5: there are none

soak: .venv/.tests ## MINUTES of trainers and faults; fails when memory or anything else keeps growing
	$(BIN)/python -m tests.e2e.soak --minutes $(MINUTES) $(ARGS)

check: .venv/.tools .venv-proto/.ready ## format, lint, types, import contracts, stubs, golden vectors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PROTO)/python proto/generate.py --check
	$(BIN)/python proto/generate_vectors.py --check

format: .venv/.tools ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.bench ## benchmarks, as ratios
	$(BIN)/equipoise bench $(ARGS)
	for part in restore sweep projection scrape; do $(BIN)/equipoise bench $$part || exit 1; done
	$(BIN)/python -m tests.benchmarks.trajectory
	$(BIN)/python -m tests.benchmarks.search
	$(BIN)/python -m tests.benchmarks.torch_exactness
	$(BIN)/python -m tests.benchmarks.torch_cost
	$(BIN)/python -m tests.benchmarks.torch_network
	$(BIN)/python -m tests.benchmarks.direction

proto: .venv-proto/.ready ## lint the contract and write its stubs
	$(PROTO)/python proto/generate.py

vectors: .venv/.runtime ## write the golden vectors, after a change to a rule
	$(BIN)/python proto/generate_vectors.py

clean: ## remove the virtual environments and caches
	rm -rf client/typescript/dist client/typescript/node_modules
	rm -rf .venv .venv-proto .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Equipoise needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments: on Debian, apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into .venv; the first time takes some minutes"
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip
	@touch $@

.venv/.runtime: .venv/.created pyproject.toml constraints.txt
	@$(PIP) --editable '.[server,embedded,trainer]'
	@touch $@

.venv/.tests: .venv/.runtime
	@$(PIP) --group test
	@touch $@

.venv/.bench: .venv/.tests
	@$(PIP) --group bench
	@touch $@

.venv/.tools: .venv/.tests
	@$(PIP) --group check
	@touch $@

.venv-proto/.ready: .venv/.created proto/constraints.txt
	@$(BIN)/python -m venv .venv-proto
	@$(PROTO)/python -m pip install --quiet --disable-pip-version-check --constraint proto/constraints.txt \
	  grpcio-tools mypy-protobuf googleapis-common-protos buf-bin
	@touch $@
