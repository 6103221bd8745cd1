# Two commands are all anybody needs: `make demo` and `make test`.
# Each makes .venv if it is missing and installs the versions pinned in requirements.lock.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c requirements.lock
# How many processes the tests use.
JOBS ?= 2
# Ordinary runs leave out the slow tier; CI adds those marked `ci`.
MARKS := $(if $(CI),not slow or ci,not slow)
CXX_FOUND := $(shell command -v c++ || command -v g++ || command -v clang++)

# Where the workloads and the peer's script are, and what `make bench` and `make scaling` are told beyond that.
SHARED ?= ../shared
OPTIONS ?=
PEER := .venv-peer/bin/python

.PHONY: help demo test test-slow check bench scaling lock clean

help:
	@echo "make demo       tune the bundled model on the bundled data, before and after, in about four minutes"
	@echo "make test       the test suite (make test-slow: the slow tier too)"
	@echo "make check      ruff, mypy --strict, import directions, file and function budgets"
	@echo "make bench      speed and memory beside TRL on this machine, about half an hour (OPTIONS=--again: go on)"
	@echo "make scaling    tokens a second by the length of rows and by their number"
	@echo "make lock       refresh requirements.lock"

# torch goes first and alone: what depends on it must find the pinned build already there.
.venv/.torch: requirements.lock
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch (first time only: a few minutes)"
	@$(PIP) torch==2.13.0
	@touch $@

.venv/.package: .venv/.torch pyproject.toml setup.py $(wildcard src/luthier/kernels/native/*.[ch])
	@echo "installing luthier and what it needs"
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.package
	@echo "installing the tools for tests and checks"
	@$(PIP) -e '.[dev]'
	@touch $@

# llama.cpp is compiled by pip (about three minutes on two cores). Only its own tests need it.
.venv/.llama-cpp: .venv/.dev
ifeq ($(CXX_FOUND),)
	@if [ -n "$(CI)" ]; then echo "no C++ compiler: CI must run the llama.cpp tests" >&2; exit 1; fi
	@echo "no C++ compiler found: the llama.cpp tests are skipped (install g++ or clang to run them)"
else
	@echo "compiling llama.cpp for its tests (first time only: a few minutes)"
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF" $(PIP) -e '.[llama-cpp]'
	@touch $@
endif

demo: .venv/.package
	@$(BIN)/luthier demo

test: .venv/.llama-cpp
	@$(BIN)/python -m pytest -n $(JOBS) -m "$(MARKS)" $(TESTS)

test-slow: .venv/.llama-cpp
	@$(BIN)/python -m pytest -n $(JOBS) $(TESTS)

check: .venv/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/structure

# The peer has an environment of its own, so that neither side has the other's libraries in its process.
.venv-peer/.ready: requirements.lock
	@test -x $(PEER) || { echo "making .venv-peer"; $(PYTHON) -m venv .venv-peer; }
	@echo "installing the peer: torch, then TRL, PEFT and bitsandbytes (first time only: a few minutes)"
	@$(PEER) -m pip --disable-pip-version-check install --quiet -c requirements.lock torch==2.13.0
	@$(PEER) -m pip --disable-pip-version-check install --quiet -c requirements.lock \
	  trl peft bitsandbytes datasets transformers matplotlib==3.10.9
	@touch $@

build/bench/.workloads: $(SHARED)/bench/make_workload.py | .venv/.package
	@echo "making the workloads: random weights of real shapes (first time only: 3 GB)"
	@mkdir -p build/bench
	@$(BIN)/python $(SHARED)/bench/make_workload.py build/bench/work --shapes 8m,135m,1b
	@touch $@

bench: .venv/.package .venv-peer/.ready build/bench/.workloads
	@$(BIN)/python benchmarks/speed.py build/bench/work --shared $(SHARED) --peer-python $(PEER) $(OPTIONS)

scaling: .venv/.package .venv-peer/.ready build/bench/.workloads
	@$(BIN)/python benchmarks/scaling.py build/bench/work --peer-python $(PEER) $(OPTIONS)

lock: .venv/.dev
	@$(BIN)/python scripts/lock.py > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv .venv-peer build dist src/*.egg-info
