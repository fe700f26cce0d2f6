#!/usr/bin/env bash
# For who has a Mac: ten minutes, no question, one file to send back, mac.json. It runs on Linux, too.
#   [PYTHON=python3.12] benchmarks/mac.sh [--output FILE] [--without demo,cpu,phone,tests] [--quick]
set -euo pipefail
cd "$(dirname "$0")/.."
make BLAS=no .venv/test >&2
exec .venv/bin/python -m benchmarks.mac "$@"
