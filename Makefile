# Every target needs only a clone, Python 3.10 or newer and a C++ compiler; the environment is made on first use.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint bench wheel clean build browser check-wheel oldest-triton

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Made once, and again when what it depends on changes. Build requirements first: the package itself is then compiled
# against them, without a second, isolated environment.
$(VENV)/.stamp: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools pybind11 ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all,dev]'
	touch $@

# Ninja finds out by itself what has changed since.
build: $(VENV)/.stamp
	$(BIN)/python tools/build_extension.py

demo: build
	$(BIN)/python -m pyinf demo

# The oldest Triton that is supported, beside the environment, not in it: kernels are also compiled with that one.
.envs/triton-3.2.0/triton: $(VENV)/.stamp
	@test -d $@ || $(BIN)/python -m pip install --quiet --no-deps --target .envs/triton-3.2.0 triton==3.2.0 || \
	  echo "triton 3.2.0 could not be installed: kernels are not compiled with it"

oldest-triton: .envs/triton-3.2.0/triton

test: build browser oldest-triton
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests --ignore=tests/packaging
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/triton
	$(BIN)/python -m pytest tests/packaging

# What `make test` does last, on its own.
check-wheel: build
	$(BIN)/python -m pytest tests/packaging

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/python tools/check_layers.py

bench: build
	$(BIN)/python -m benchmarks.cpu_ops

wheel: $(VENV)/.stamp
	$(BIN)/python -m build --outdir dist

# The report's test drives it in a headless Chromium. Without one it skips itself, which counts against the budget.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null && command -v chromedriver >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 && exit 0; \
	fi; \
	echo "no Chromium, and it could not be installed: the report is not tested in a browser"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis pyinf/_C.*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
