"""The engine against the loops a user would write, PEFT on torch, and the machine.

One process (but for the mlx-lm loops with the wheel's own BLAS), the same rows. Every timing
includes building graphs, the evaluation and reading the losses back; for mlx-lm's loops also
loading base and adapter, as those loops do.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks.common import load_library, run
from benchmarks.other_loops import mlx_lm_loop, peft_loop, plain_loop
from benchmarks.stock_models import torch_model
from d2c_mlx.adapters.peft_format import save_peft
from d2c_mlx.evaluate.batches import shared_prefix
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.kernels import use_fast_exponentials
from d2c_mlx.utils.environment import limit_blas_threads


def timed(body, repeats):
    """`(median seconds, result)` of `repeats` calls."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = body()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def matmul_rate():
    """FLOP/s of a plain float32 matmul on all cores, the best of this model's MLP and a square."""
    limit_blas_threads(os.cpu_count())
    best = 0.0
    for m, k, n in ((430, 576, 1536), (2048, 2048, 2048)):
        a, b = mx.random.normal((m, k)), mx.random.normal((k, n))
        mx.eval(a, b)
        calls = max(1, int(4e10 / (2 * m * k * n)))

        def body(a=a, b=b, calls=calls):
            for _ in range(calls):
                mx.eval(a @ b)

        body()
        best = max(best, 2 * m * k * n * calls / timed(body, 5)[0])
    return best


def useful_flops(base, sets):
    """2 x parameters x needed tokens, each once; the head at targets only."""
    body = sum(width * out for width, out in base.module_shapes.values())
    hidden, vocabulary = base.dimensions
    needed = 0
    for one in sets:
        n_prefix = len(shared_prefix(one))
        needed += n_prefix + sum(len(row.tokens) - 1 - n_prefix for row in one.examples)
    return 2 * (needed * body + sum(one.n_targets for one in sets) * hidden * vocabulary)


def wheel_loop(base, adapter, rows, float32):
    """Seconds of loading and per token of mlx-lm's loop with the wheel's own BLAS."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(rows, file)
        file.flush()
        script = Path(__file__).with_name("stock_loop.py")
        command = [sys.executable, script, base.path, adapter, file.name]
        command += ["--float32"] if float32 else []
        out = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    loading, seconds, tokens = json.loads(out.stdout.splitlines()[-1])
    return loading, seconds / tokens


class Clock:
    """Seconds and losses by name."""

    def __init__(self):
        """Nothing yet."""
        self.seconds, self.values = {}, {}

    def record(self, name, body, times=1):
        """Time a body that returns losses, and say so."""
        self.seconds[name], self.values[name] = timed(body, times)
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)

    def differences(self, n_targets):
        """Largest differences of losses, in nats per target token."""

        def between(name, other):
            gap = np.array(self.values[name]) - np.array(self.values[other])
            return float(np.abs(gap / n_targets).max())

        others = ("plain", "mlx-lm loop", "PEFT")
        exact = [name for name in self.values if name not in others]
        return {
            "max_loss_difference": max(between(name, "plain") for name in exact),
            "loss_difference_of_mlx_lm": between("mlx-lm loop", "plain"),
            "loss_difference_of_peft": between("PEFT", "plain"),
        }  # fmt: skip


def measure_loops(clock, base, adapters, sets, repeats):
    """mlx-lm's loop, with our BLAS and with the wheel's; the plain one; PEFT."""
    n_tokens = len(adapters) * sum(one.n_tokens for one in sets)
    with tempfile.TemporaryDirectory() as directory:
        mlx, peft = ([Path(directory) / kind / adapter.name for adapter in adapters]
                     for kind in ("mlx", "peft"))  # fmt: skip
        for adapter, stock, plain in zip(adapters, mlx, peft):
            adapter.save(stock, base.n_layers)
            save_peft(adapter, plain)
        clock.record("mlx-lm loop", lambda: mlx_lm_loop(base.path, mlx, sets))
        clock.values["plain"] = plain_loop(base, adapters, sets)
        for name, float32, rows in (
            ("mlx-lm loop, own BLAS", True,
             [(one.examples[0].tokens, one.examples[0].first_target) for one in sets[:6]]),
            ("mlx-lm loop, own BLAS, 4 bit as stored", False,
             [(sets[0].examples[0].tokens[:12], 1)]),
        ):  # fmt: skip
            loading, per_token = wheel_loop(base, mlx[0], rows, float32)
            clock.seconds[name] = len(adapters) * loading + n_tokens * per_token
        mx.clear_cache()
        (Path(directory) / "base").mkdir()
        model = torch_model(base, peft, Path(directory) / "base")
        clock.record("PEFT", lambda: peft_loop(model, [path.name for path in peft], sets), repeats)


def measure(library, n_adapters, n_examples, repeats):
    """Seconds and losses of everything, as the keys of results/probe.json."""
    base, adapters, _, sets = load_library(library, n_examples)
    adapters = adapters[:n_adapters]
    pieces = [(adapter, one) for adapter in adapters for one in sets]
    clock = Clock()
    run(Engine(base), pieces[:2])
    clock.record("d2c-mlx", lambda: run(Engine(base), pieces), repeats)
    clock.record("d2c-mlx again", lambda: run(Engine(base), pieces), repeats)
    # mlx-lm's own, all cores.
    use_fast_exponentials(base.model, False)
    limit_blas_threads(os.cpu_count())
    measure_loops(clock, base, adapters, sets, repeats)
    seconds, n_tokens = clock.seconds, n_adapters * sum(one.n_tokens for one in sets)
    ours = statistics.mean([seconds["d2c-mlx"], seconds["d2c-mlx again"]])
    rate, useful = matmul_rate(), n_adapters * useful_flops(base, sets) / ours
    return {
        "n_adapters_timed": n_adapters, "n_tasks": len(sets), "n_examples": n_examples,
        "n_tokens": n_tokens, "seconds": seconds, "tokens_per_second": n_tokens / ours,
        "speedup_vs_mlx_lm_loop": seconds["mlx-lm loop"] / ours,
        "speedup_vs_mlx_lm_loop_own_blas": seconds["mlx-lm loop, own BLAS"] / ours,
        "speedup_vs_mlx_lm_loop_as_stored":
            seconds["mlx-lm loop, own BLAS, 4 bit as stored"] / ours,
        "speedup_vs_peft": seconds["PEFT"] / ours,
        "useful_flops": useful, "matmul_flops": rate, "sgemm_share": useful / rate,
        **clock.differences(np.array([one.n_targets for _, one in pieces])),
    }  # fmt: skip
