"""Packs made without rows, judged on held-out rows beside packs made with them.

    python -m benchmarks.quality.without_rows --library DIR [--budgets 3,6,12,12.5%,3%] [--work DIR]

Each pack is that of a `d2c-mlx run` without `--tasks`; rows only judge it. Beside it stand the
packs made with rows that results/slots.json ("estimates") and results/bytes.json ("auto") have.
A budget that is in the results is not repeated. Results: results/without_rows.json.
"""

import json
import os
import tempfile
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import ends
from benchmarks.tables.result_files import markdown, reader
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json


def measure(library, budget, tests, directory):
    """One budget: the pack without rows, and its excess on held-out rows."""
    config = RunConfig(
        adapters=str(library / "adapters"), output=str(directory / budget), budget=budget
    )
    pack = load_pack(run(config, until="pack", quiet=True).path("pack"))
    config = config.replace(
        tasks=str(library / "tasks"), test_examples=tests, output=str(directory / "judge")
    )
    judge = run(config, until="convert", quiet=True)
    methods = {
        **ends(judge),
        "pack": BenchMethod(pack.nbytes, [{name: pack.load(name) for name in judge.inputs.names}]),
    }
    found = bench_methods(judge.evaluator, methods, judge.inputs.tests)["pack"]
    losses = {name: one["loss"] for name, one in found.pop("tasks").items()}
    return {"budget": budget, **found, "tasks": losses}


def with_rows():
    """Budget -> excess and retention of the default with rows, mean over seeds."""
    read, found = reader(), {}
    rows = [(str(one["clusters"]), one) for one in read("slots")["rows"]
            if one["case"] == "estimates"]  # fmt: skip
    rows += [(one["budget"], one) for one in read("bytes")["rows"] if one["family"] == "auto"]
    for budget, one in rows:
        found.setdefault(budget, []).append((one["excess"], one["retention"]))
    return {key: [sum(one) / len(some) for one in zip(*some)] for key, some in found.items()}


def table(rows):
    """The table, in Markdown."""
    beside, lines = with_rows(), []
    for one in rows:
        excess, kept = beside.get(one["budget"], (float("nan"), float("nan")))
        lines.append([f"`{one['budget']}`", f"{one['excess']:.3f}", f"{one['retention']:.1%}",
                      f"{excess:.3f}", f"{kept:.1%}"])  # fmt: skip
    header = ["budget", "excess without rows", "kept", "with rows", "kept"]
    return "\n".join(markdown(header, lines))


def main():
    """Measure what is missing, and print."""
    parser = command_line(__doc__, __spec__, "without_rows.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--budgets", default="3,6,12,12.5%,3%")
    parser.add_argument("--tests", type=int, default=30)
    parser.add_argument("--work", type=Path, help="run directories, to be used again")
    options = parser.parse_args()
    output, rows = options.output, []
    if output.exists():
        before = json.loads(output.read_text())
        rows = before["rows"] if before["tests"] == options.tests else []
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        work = options.work or Path(directory)
        for budget in options.budgets.split(","):
            if budget not in {one["budget"] for one in rows}:
                rows.append(measure(options.library, budget, options.tests, work))
                content = {"tests": options.tests, "rows": rows, "machine": machine()}
                write_json(output, content)
                print(budget, f"{rows[-1]['excess']:.4f} {rows[-1]['retention']:.1%}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
