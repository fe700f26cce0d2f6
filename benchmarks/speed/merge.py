"""40 adapters of Llama-3.2-1B shapes into 5: our `linear` against PEFT's `svd` combination.

Each side runs in a process of its own, which makes the same random float32 adapters of rank 32
(16 layers, q, k, v, o; singular values fall as those of trained LoRAs do) and merges 5 clusters of
8. Seconds are those of the merges alone, on the clock and of the CPU (`--threads` 1 by default: on
a machine that does other things too, threads that wait for each other measure that). Peak memory
is that of the whole process, adapters and libraries included; PEFT's base weights take none here.
Errors are against a dense SVD in float64 of the first cluster's first layer.

    python -m benchmarks.speed.merge [--quick | --layers N] [--threads N]

`--layers N` merges only N layers with PEFT, `--quick` one, and multiplies its seconds: said so in
the table and in results/merge.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks import command_line
from benchmarks.tables.pages import show
from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

LAYERS, ADAPTERS, CLUSTERS, RANK, ALPHA = 16, 40, 5, 32, 64
SHAPES = {"q_proj": (2048, 2048), "k_proj": (2048, 512), "v_proj": (2048, 512),
          "o_proj": (2048, 2048)}  # fmt: skip
MEMBERS = [range(k, ADAPTERS, CLUSTERS) for k in range(CLUSTERS)]


def factors(adapter, layer, name):
    """`a (in, r)` and `b (r, out)` of one module, the same on both sides."""
    rng = np.random.default_rng([adapter, layer, sorted(SHAPES).index(name)])
    width, out = SHAPES[name]
    a = rng.standard_normal((width, RANK), np.float32) / np.float32(np.sqrt(width))
    b = rng.standard_normal((RANK, out), np.float32) * 0.93 ** np.arange(RANK)[:, None]
    return a, (b / np.sqrt(out)).astype(np.float32)


def clocks():
    """Seconds of the clock and of this process's CPU time."""
    return np.array([time.perf_counter(), time.process_time()])


def ours(n_layers):
    """`(seconds, factors of the first cluster's first layer)`."""
    adapters = []
    for i in range(ADAPTERS):
        modules = {}
        for layer in range(n_layers):
            for name in SHAPES:
                a, b = map(mx.array, factors(i, layer, name))
                modules[f"model.layers.{layer}.{name}"] = LoRA(a, b, ALPHA / RANK)
        adapters.append(Adapter(f"{i:02d}", modules))
    started = clocks()
    merged = [merge_adapters([adapters[i] for i in members]) for members in MEMBERS]
    return clocks() - started, {
        name: merged[0].modules[f"model.layers.0.{name}"].factors() for name in SHAPES
    }


def peft(n_layers):
    """The same of PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Base(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict({name: linear(*shape) for name, shape in SHAPES.items()})
                for _ in range(n_layers)
            )

    def linear(width, out):
        module = torch.nn.Linear(1, 1, bias=False)
        module.in_features, module.out_features = width, out
        zero = torch.zeros(1, 1).expand(out, width)
        module.weight = torch.nn.Parameter(zero, requires_grad=False)
        return module

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(SHAPES))
    model = get_peft_model(Base(), config, adapter_name="00")
    for i in range(1, ADAPTERS):
        model.add_adapter(f"{i:02d}", config)
    for layer, modules in enumerate(model.base_model.model.layers):
        for name, module in modules.items():
            for i in range(ADAPTERS):
                a, b = factors(i, layer, name)
                module.lora_A[f"{i:02d}"].weight.data = torch.from_numpy(a.T.copy())
                module.lora_B[f"{i:02d}"].weight.data = torch.from_numpy(b.T.copy())
    started = clocks()
    for k, members in enumerate(MEMBERS):
        names = [f"{i:02d}" for i in members]
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), f"cluster-{k}", "svd")
    seconds = clocks() - started
    found = {}
    for name, module in model.base_model.model.layers[0].items():
        a, b = (x["cluster-0"].weight.detach().numpy() for x in (module.lora_A, module.lora_B))
        found[name] = a.T, b.T * module.scaling["cluster-0"]
    return seconds, found


def measure(side, n_layers, n_threads, directory):
    """Run one side in a child process: its seconds, peak bytes and factors."""
    file = directory / f"{side}.npz"
    command = [sys.executable, "-m", "benchmarks.speed.merge", "--side", side,
               "--layers", str(n_layers), "--to", file]  # fmt: skip
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(n_threads))}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    ).stdout
    with np.load(file) as saved:
        found = {name: (saved[f"{name}.a"], saved[f"{name}.b"]) for name in SHAPES}
    return {**json.loads(output.splitlines()[-1]), "factors": found}


def child(side, n_layers, file):
    """One side; its peak memory is that of this process."""
    seconds, found = {"ours": ours, "peft": peft}[side](n_layers)
    arrays = {f"{name}.{x}": ab[i] for name, ab in found.items() for i, x in enumerate("ab")}
    np.savez(file, **arrays)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"seconds": seconds[0], "cpu_seconds": seconds[1], "peak_nbytes": peak}))


def errors(sides):
    """Per side the largest error against float64, and of the truncation against the best one.

    The first is |dW - best| / |best|; near-equal singular values at the cut amplify rounding in
    it. The second is |mean - dW| / |mean - best| - 1, which they leave alone.
    """
    worst = {side: [0.0, 0.0] for side in sides}
    for name in SHAPES:
        pairs = [factors(i, 0, name) for i in MEMBERS[0]]
        mean = sum(a.astype(np.float64) @ b for a, b in pairs) * ALPHA / RANK / len(pairs)
        u, s, vt = np.linalg.svd(mean, full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ vt[:RANK]
        for side, found in sides.items():
            a, b = (x.astype(np.float64) for x in found[name])
            error = np.linalg.norm(a @ b - best) / np.linalg.norm(best)
            excess = np.linalg.norm(a @ b - mean) / np.linalg.norm(s[RANK:]) - 1
            worst[side] = [max(worst[side][0], error), max(worst[side][1], excess)]
    return worst


def main():
    """Measure both, print the table, write results/merge.json."""
    parser = command_line(__doc__, __spec__, "merge.json")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of PEFT's side  [default: 16]")
    parser.add_argument("--quick", action="store_true", help="the same as --layers 1")
    parser.add_argument("--threads", type=int, default=1, help="of both sides  [default: 1]")
    parser.add_argument("--side", choices=("ours", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        child(options.side, options.layers, options.to)
        return
    n_layers = 1 if options.quick else min(options.layers, LAYERS)
    with tempfile.TemporaryDirectory() as directory:
        runs = {
            side: measure(side, layers, options.threads, Path(directory))
            for side, layers in (("ours", LAYERS), ("peft", n_layers))
        }
    worst = errors({side: run.pop("factors") for side, run in runs.items()})
    for side, run in runs.items():
        run["layers"] = LAYERS if side == "ours" else n_layers
        run["error"], run["excess_truncation_error"] = worst[side]
        for clock in ("seconds", "cpu_seconds"):
            run[f"{clock}_all_layers"] = run[clock] * LAYERS / run["layers"]
    ratios = {
        clock: runs["peft"][f"{clock}_all_layers"] / runs["ours"][clock]
        for clock in ("seconds", "cpu_seconds")
    }
    result = {**runs, "ratio": ratios, "threads": options.threads, "machine": machine()}
    show("merge", merge=result)
    if not options.quick:
        write_json(options.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
