"""The probe engine at the machine's limit: one table, and results/probe.json.

    python benchmarks/probe.py [--quick] [--library DIR] [--only engine,d2c,growth,ranks]

The parts run one after the other, each saved when it is done: `engine.py` (against mlx-lm's loop,
PEFT on torch and a plain matmul; each saving alone), `d2c.py` (evaluations asked for and done),
`growth.py` (time per stage against the number of adapters) and `ranks.py` (two ranks on one
machine). Each says what its timings include. `--quick` takes few adapters and rows: minutes, not
most of an hour. Machines are noisy: compare numbers of one run.
"""

import argparse
import json
from pathlib import Path

import d2c
import engine
import growth
import ranks

from d2c_mlx.doctor import machine
from d2c_mlx.files import write_json

RESULT = Path(__file__).parent / "results" / "probe.json"
PARTS = ("engine", "d2c", "growth", "ranks")


def measure(part, library, quick, sizes):
    """The keys that one part adds to the result."""
    if part == "engine":
        return engine.measure(library, 2, 3 if quick else 10, 1)
    if part == "d2c":
        n_clusters, restarts, n_examples = (2, 2, 4) if quick else (6, 4, 4)
        return d2c.measure(library, n_clusters, restarts, n_examples)
    if part == "growth":
        return growth.measure(library, (2, 4, 8) if quick else sizes, 2 if quick else 6, 160)
    return ranks.measure(library, 2 if quick else 4, 3 if quick else 10, 1 if quick else 3)


def table(result):
    """Rows (what, value, target) of whatever was measured."""
    rows = []
    if "tokens_per_second" in result:
        rows += [
            ("d2c-mlx, tokens/s", f"{result['tokens_per_second']:.0f}", ""),
            *((f"without {name}: times slower", f"{ratio:.2f}", "")
              for name, ratio in result["savings"].items() if name not in ("frozen", "stack 2")),
            ("`frozen`, adapters on the last 16 blocks: times faster",
             f"{result['savings']['frozen']:.2f}", ""),
            ("`--stack 2`: times faster", f"{result['savings']['stack 2']:.2f}", ""),
            ("mlx-lm loop, float32, our BLAS: times slower",
             f"{result['speedup_vs_mlx_lm_loop']:.2f}", "10"),
            ("mlx-lm loop, float32, the wheel's BLAS: times slower (6 rows, scaled)",
             f"{result['speedup_vs_mlx_lm_loop_own_blas']:.0f}", ""),
            ("mlx-lm loop, 4 bit as stored, the wheel's BLAS: times slower (12 tokens, scaled)",
             f"{result['speedup_vs_mlx_lm_loop_as_stored']:.0f}", ""),
            ("PEFT on torch: times slower", f"{result['speedup_vs_peft']:.2f}", "2"),
            ("useful FLOPs, share of a plain float32 matmul",
             f"{result['sgemm_share']:.0%}", "50%"),
            ("largest loss difference to the plain loop (nats per token)",
             f"{result['max_loss_difference']:.1e}", "1e-4"),
        ]  # fmt: skip
    if "evaluations_asked" in result:
        rows += [
            ("D2C: evaluations asked for", f"{result['evaluations_asked']}", ""),
            ("D2C: evaluations done", f"{result['evaluations_done']:.0f}", ""),
            ("D2C: asked for / done", f"{result['evaluations_ratio']:.2f}", "5"),
            ("D2C: seconds", f"{result['d2c_seconds']:.0f}", ""),
        ]
    for stage, one in result.get("growth", {}).items():
        sizes = ", ".join(map(str, result["growth_sizes"]))
        seconds = ", ".join(f"{s:.1f}" for s in one["seconds"])
        target = "2" if stage == "probe" else "1"
        rows.append((f"{stage}: seconds for N = {sizes}; exponent",
                     f"{seconds}; {one['exponent']:.2f}", target))  # fmt: skip
    if "ranks_ratio" in result:
        same = "the same bytes" if result["ranks_same_bytes"] else "OTHER BYTES"
        seconds = ", ".join(f"{one:.1f}" for one in result["ranks_seconds"].values())
        rows.append(("one rank on all cores, two on the same, two under mlx.launch: seconds",
                     f"{seconds}; {result['ranks_ratio']:.2f}, {same}", ""))  # fmt: skip
    return rows


def main():
    """Measure, save after each part, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, others are kept")
    parser.add_argument("--sizes", default="8,16,32,64", help="numbers of adapters of growth")
    options = parser.parse_args()
    sizes = tuple(map(int, options.sizes.split(",")))
    some = options.only != ",".join(PARTS) and RESULT.exists()
    result = json.loads(RESULT.read_text()) if some else {}
    for part in options.only.split(","):
        result |= measure(part, options.library, options.quick, sizes)
        result |= {"library": str(options.library), "quick": options.quick, "machine": machine()}
        write_json(RESULT, result)
    print("| what | value | target |\n|---|--:|--:|")
    for row in table(result):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
