"""mlx-lm's own loop over rows, as a user would write it.

As a program it runs in a process of its own, which knows nothing of d2c-mlx and its BLAS (hence the
path, `-m` would load both). Prints seconds of loading, seconds of the rows, and their tokens.

    python benchmarks/speed/stock_loop.py BASE ADAPTER_DIRECTORY ROWS.json [--float32]
"""

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model, load


def load_mlx_lm(base, adapter, float32):
    """The base with an adapter, in float32 or as stored."""
    model, _ = load(str(base), adapter_path=str(adapter))
    if float32:
        model.set_dtype(mx.float32)
        model = dequantize_model(model)
        mx.eval(model.parameters())
    return model


def mlx_lm_rows(model, rows):
    """One forward per example, full logits, mlx-lm's own loss; rows are (tokens, first target)."""
    for tokens, first in rows:
        logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
        nll = nn.losses.cross_entropy(logits, mx.array(tokens[1:]))
        yield nll[first - 1 :].sum().item()


def main():
    """Time the loading and the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="directory of the base model")
    parser.add_argument("adapter", help="directory of an adapter in mlx-lm's layout")
    parser.add_argument("rows", type=Path, help="JSON list of [tokens, first target]")
    parser.add_argument("--float32", action="store_true", help="else as stored")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    started = time.perf_counter()
    model = load_mlx_lm(options.base, options.adapter, options.float32)
    mx.eval(model.parameters())
    loaded = time.perf_counter()
    list(mlx_lm_rows(model, rows))
    tokens = sum(len(tokens) for tokens, _ in rows)
    print(json.dumps([loaded - started, time.perf_counter() - loaded, tokens]))


if __name__ == "__main__":
    main()
