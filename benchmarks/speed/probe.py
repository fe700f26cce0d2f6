"""The probe engine at the machine's limit: one table, and results/probe.json.

    python -m benchmarks.speed.probe [--quick] [--library DIR] [--only engine,d2c,growth,ranks]

The parts run one after the other, each saved when it is done, and each says what its timings
include. `--quick` takes few adapters and rows: minutes, not most of an hour. Machines are noisy:
compare numbers of one run.

- engine: against mlx-lm's loop, PEFT on torch and a plain matmul (engine.py)
- d2c: evaluations asked for and done (evaluations.py)
- growth: seconds of every stage against the number of adapters (growth.py)
- ranks: two ranks on one machine (ranks.py)
"""

import json
from pathlib import Path

from benchmarks import RESULTS, command_line
from benchmarks.speed import engine, evaluations, growth, ranks
from benchmarks.tables.pages import show
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

PARTS = ("engine", "d2c", "growth", "ranks")


def measure(part, library, quick, sizes):
    """The keys that one part adds to the result."""
    if part == "engine":
        return engine.measure(library, 2, 3 if quick else 10, 1)
    if part == "d2c":
        n_clusters, restarts, n_examples = (2, 2, 4) if quick else (6, 4, 10)
        return evaluations.measure(library, n_clusters, restarts, n_examples)
    if part == "growth":
        return growth.measure(library, (2, 4, 8) if quick else sizes, 2 if quick else 6, 160)
    return ranks.measure(library, 2 if quick else 4, 3 if quick else 10, 1 if quick else 3)


def main():
    """Measure, save after each part, print."""
    parser = command_line(__doc__, __spec__, "probe.json")
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, others are kept")
    parser.add_argument("--sizes", default="8,16,32,64", help="numbers of adapters of growth")
    options = parser.parse_args()
    sizes = tuple(map(int, options.sizes.split(",")))
    output = options.output
    if options.quick and output == RESULTS / "probe.json":  # The page has whole runs.
        output = None
    some = options.only != ",".join(PARTS) and output and output.exists()
    result = json.loads(output.read_text()) if some else {}
    for part in options.only.split(","):
        result |= measure(part, options.library, options.quick, sizes)
        result |= {"library": str(options.library), "quick": options.quick, "machine": machine()}
        if output:
            write_json(output, result)
    show("probe", probe=result)


if __name__ == "__main__":
    main()
