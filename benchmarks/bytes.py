"""The byte budget: what `--plan auto` chooses at several budgets, and each family alone.

    python benchmarks/bytes.py --library DIR [--budgets 25,12.5,6.25,3,1.5,0.75]

Candidates are measured once for all budgets, on probes only; the choices are then judged on
held-out rows. Bytes are those of the compact file. Results: results/bytes.json.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import d2c_mlx  # noqa: F401  the fast BLAS first
from d2c_mlx.bench import Method, bench_methods
from d2c_mlx.candidates import candidates_of, worth
from d2c_mlx.compact import index_of
from d2c_mlx.config import RunConfig
from d2c_mlx.doctor import machine
from d2c_mlx.files import write_json
from d2c_mlx.layout import compact_nbytes
from d2c_mlx.pipeline import run
from d2c_mlx.plan import allocate
from d2c_mlx.planner import make_plan, measure, planned
from d2c_mlx.workspace import Workspace

RESULT = Path(__file__).parent / "results" / "bytes.json"
# Candidates that a family may choose from.
FAMILIES = {
    "auto": ("base", "own", "merged"),
    "rank and bits": ("base", "own"),
    "merges": ("base", "merged"),
    "bits alone": ("base", "bits"),
    "rank alone": ("base", "rank"),
}


def bits_alone(ws):
    """Candidates with all components of an adapter at the same bits."""
    found = []
    for bits in (2, 3, 4, 8):
        forms = [
            ((i,), adapter, {p: ((lora.rank, bits),) for p, lora in adapter.modules.items()})
            for i, adapter in enumerate(ws.adapters)
        ]
        found += candidates_of(ws, forms, "bits", bits / 16)
    return found


def rank_alone(ws):
    """Candidates with some components of an adapter in 16 bit."""
    found = []
    widths = {path: sum(shape) for path, shape in ws.base.module_shapes.items()}
    for share in (2.0**k for k in range(-6, 1)):
        forms = []
        for i, adapter in enumerate(ws.adapters):
            levels = allocate(worth(adapter, [ws.gains[i]]), widths, share * ws.sizes[i], (16,))
            forms.append(((i,), adapter, {path: some for path, some in levels.items() if some}))
        found += candidates_of(ws, forms, "rank", share)
    return found


ALONE = {"bits alone": bits_alone, "rank alone": rank_alone}


def judge(ws, plan):
    """Held-out rows of one plan: bytes of the file, excess loss, retention."""
    adapters, serves = planned(ws, plan)
    plain = [one.adapter(ws.base.dtype) for one in adapters]
    served = {name: None if k is None else plain[k] for name, k in serves.items()}
    methods = {
        "base": Method(0, [dict.fromkeys(ws.names)]),
        "individual": Method(0, [dict(zip(ws.names, ws.adapters))]),
        "plan": Method(compact_nbytes(index_of(adapters)), [served]),
    }
    benched = bench_methods(ws.evaluator, methods, ws.tests)["plan"]
    return {key: benched[key] for key in ("nbytes", "excess", "retention")} | {
        "worst": max(benched["tasks"].items(), key=lambda item: item[1]["excess"])[0]
    }


def row(ws, name, budget, room, candidates):
    """What a family chooses for a budget, and what that is worth."""
    plan = make_plan(ws, [one for one in candidates if one.family in FAMILIES[name]], room)
    merged = [unit["family"] for unit in plan["units"]].count("merged")
    result = {
        "budget": budget, "family": name, "probe_regret": plan["regret"],
        "own": len(plan["units"]) - merged, "merged": merged, "base": len(plan["base"]),
    } | judge(ws, plan)  # fmt: skip
    return result | {"share": result["nbytes"] / sum(ws.sizes)}


def line(one):
    """Of the table."""
    return (
        f"| {one['budget']} | {one['family']} | {one['share']:.2%} | {one['probe_regret']:.4f} |"
        f" {one['excess']:.4f} | {one['retention']:.2%} | {one['own']} own, {one['merged']} merged,"
        f" {one['base']} base |"
    )


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--budgets", default="25,12.5,6.25,3,1.5,0.75", help="percent")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=100)
    options = parser.parse_args()
    budgets = [f"{x}%" for x in options.budgets.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        config = RunConfig(
            adapters=str(options.library / "adapters"), tasks=str(options.library / "tasks"),
            output=str(Path(directory) / "run"), budget=budgets[0], plan="auto",
            probe_examples=options.examples, test_examples=options.tests,
        )  # fmt: skip
        ws = run(config, until="probe", quiet=True)
        rooms = [Workspace(replace(config, budget=one), quiet=True).room for one in budgets]
        started = time.perf_counter()
        candidates = measure(ws, rooms)
        facts = {
            "candidates": len(candidates), "seconds": round(time.perf_counter() - started, 1),
            "examples": options.examples, "tests": options.tests, "machine": machine(),
            "probe_tokens": ws.evaluator.counts.tokens,
        }  # fmt: skip
        print(json.dumps(facts), flush=True)
        rows = []
        for name in options.families.split(","):
            if name in ALONE:
                candidates += ALONE[name](ws)
            for budget, room in zip(budgets, rooms):
                rows.append(row(ws, name, budget, room, candidates))
                write_json(RESULT, facts | {"rows": rows})
                print(line(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
