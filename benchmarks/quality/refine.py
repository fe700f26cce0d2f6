"""Refining one merge: the gain on held-out rows, and the seconds.

Merges the named adapters, refines, and compares both on test rows that refining never sees.
Seconds are those of `refine` alone: teachers, answers to prompts, training and held-back looks.
Scale is given, not tuned. Prompts without answers are those of `train.jsonl`.

    python -m benchmarks.quality.refine --library DIR reply-de,reply-en gec-de,gec-en [--seeds 0,1]
"""

import json
import time
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.common import run
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.merge.methods import merge_adapters, scaled
from d2c_mlx.merge.refine import Member, RefineOptions, refine
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.tasks import load_task
from d2c_mlx.utils.device import machine


def prompts(base, library, name, n):
    """The first `n` rows of `train.jsonl`; refining reads only their prompts."""
    lines = (library / "tasks" / name / "train.jsonl").read_text(encoding="utf-8").split("\n")
    return base.encode(name, [json.loads(line) for line in lines[:n]]) if n else None


def measure(base, engine, names, args):
    """One row per seed."""
    library = args.library
    adapters = [read_adapter(library / "adapters" / n, base.module_shapes) for n in names]
    tasks = [load_task(library / "tasks" / name) for name in names]
    probes = [base.encode(task.name, task.probe[: args.probe_examples]) for task in tasks]
    tests = [base.encode(task.name, task.test[: args.test_examples]) for task in tasks]
    n_targets = np.array([probe.n_targets for probe in probes])
    bare = np.array(run(engine, [(None, probe) for probe in probes])) / n_targets
    own = np.array(run(engine, list(zip(adapters, probes)))) / n_targets
    gains = np.maximum(bare - own, 0.05)
    merged = scaled(merge_adapters(adapters), args.scale).uniform(base.dtype)
    members = [
        Member(adapter, probe, float(gain), prompts(base, library, probe.task, args.prompts))
        for adapter, probe, gain in zip(adapters, probes, gains)
    ]
    methods = {
        "base": BenchMethod(0, [dict.fromkeys(names)]),
        "individual": BenchMethod(0, [dict(zip(names, adapters))]),
        "merge": BenchMethod(0, [dict.fromkeys(names, merged)]),
    }
    facts = {}
    for seed in args.seeds:
        started = time.perf_counter()
        options = RefineOptions(args.steps, args.rate, args.kl_weight, seed=seed)
        refined = refine(base, merged, members, options)
        facts[f"seed {seed}"] = {
            "seconds": round(time.perf_counter() - started, 1),
            "step": refined.step,
            "stopped": refined.stopped,
            "curve": refined.curve,
        }
        methods[f"seed {seed}"] = BenchMethod(0, [dict.fromkeys(names, refined.adapter)])
    results = bench_methods(Evaluator(engine), methods, tests)
    print(f"\n{', '.join(names)}: merge {results['merge']['excess']:.4f} excess,"
          f" {results['merge']['retention']:.3f} retention")  # fmt: skip
    for name, fact in facts.items():
        result, curve = results[name], dict(fact["curve"])
        print(f"{name}: {result['excess']:.4f} excess, {result['retention']:.3f} retention, step"
              f" {fact['step']}, held back {curve[0]:.4f} -> {curve[fact['step']]:.4f},"
              f" {fact['seconds']} s, {fact['stopped']}", flush=True)  # fmt: skip
    return {"members": names, "methods": results, "refined": facts}


def main():
    """Parse, measure every cluster, print."""
    parser = command_line(__doc__, __spec__)
    parser.add_argument("clusters", nargs="+", help="adapter names, comma-separated")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.4)
    parser.add_argument("--steps", type=int, default=RefineOptions.steps)
    parser.add_argument("--rate", type=float, default=RefineOptions.rate)
    parser.add_argument("--kl-weight", type=float, default=RefineOptions.kl_weight)
    parser.add_argument("--probe-examples", type=int, default=10)
    parser.add_argument("--test-examples", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=0, help="without answers, per task")
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split(","))), default=[0])
    args = parser.parse_args()
    base = BaseModel()
    engine = Engine(base)
    rows = [measure(base, engine, cluster.split(","), args) for cluster in args.clusters]
    options = {**vars(args), "library": str(args.library)}
    print(json.dumps({"options": options, "machine": machine(), "clusters": rows}))


if __name__ == "__main__":
    main()
