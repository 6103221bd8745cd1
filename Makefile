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

.PHONY: help demo test test-slow check lock clean

help:
	@echo "make demo       tune the bundled model on the bundled data, before and after, in about four minutes"
	@echo "make test       the test suite (make test-slow: the slow tier too)"
	@echo "make check      ruff, mypy --strict, import directions, file and function budgets"
	@echo "make lock       refresh requirements.lock"

# torch goes first and alone: what depends on it must find the pinned build already there.
.venv/.torch: requirements.lock
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch (first time only: a few minutes)"
	@$(PIP) torch==2.13.0
	@touch $@

.venv/.package: .venv/.torch pyproject.toml
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

lock: .venv/.dev
	@$(BIN)/python scripts/lock.py > requirements.lock.new && mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv build dist src/*.egg-info
