# make bench | test | slow | lint | format | clean    in a fresh clone: needs python3 (with venv), make and a C++17 compiler
PYTHON ?= python3
VENV   ?= .venv
# Installed before anything that depends on torch; see the dev extra in pyproject.toml.
TORCH  ?= $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# nvcc, installed before the build that looks for it; what the machine has on PATH or in /usr/local/cuda comes first.
NVCC_PACKAGE ?= $(shell sed -n 's/^ *"\(cuda-toolkit[^"]*\)".*/\1/p' pyproject.toml)
ARGS   ?=

BIN    := $(VENV)/bin
# Without the warnings: setuptools lectures on every editable install.
PIP    := PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet
# A path entry, which wins over a folder called pyguide where python is started; setuptools' finder would not.
EDITABLE := --config-settings editable_mode=compat
SOURCES := $(wildcard csrc/*.h csrc/*.cpp kernels/*.h kernels/*.cuh kernels/*.cu)
CXX_FILES := $(SOURCES) $(wildcard tests/simulated/*.h tests/simulated/*.cpp)
NATIVE := setup.py pyproject.toml $(SOURCES)

WORKERS := -n auto --dist worksteal

.PHONY: bench test slow lint format clean help
help:
	@sed -n 1p Makefile

bench: $(VENV)/bench.stamp
	$(BIN)/python -m pyguide.bench $(ARGS)

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "not slow" $(WORKERS) $(ARGS)

slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow $(WORKERS) $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f pyguide/*.so pyguide/_build_error.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/torch.stamp:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)"
	touch $@

# The editable install compiles pyguide._C into the tree; a changed source or build file does it again.
$(VENV)/bench.stamp: $(VENV)/torch.stamp $(NATIVE)
	$(PIP) $(EDITABLE) -e ".[bench]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(NATIVE)
	$(PIP) "$(NVCC_PACKAGE)"
	$(PIP) $(EDITABLE) -e ".[dev]"
	touch $(VENV)/bench.stamp $@
