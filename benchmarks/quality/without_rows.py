"""Packs made without rows, judged on held-out rows beside packs made with them.

    python -m benchmarks.quality.without_rows --library DIR [--budgets 3,6,12,12.5%,3%]
        [--case weights] [--work DIR]

- *weights*: a `d2c-mlx run` without `--tasks`; rows only judge it.
- *prompts*: the same on the prompts of 20 rows of each task's probe.jsonl without
  their answers.

Beside them stand the packs made with rows that results/slots.json ("estimates") and
results/bytes.json ("auto") have. A pack that is in the results is not made again. In `--work` runs
are called as `benchmarks.quality.scores` takes them. Results: results/without_rows.json.
"""

import json
import os
import tempfile
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import ends
from benchmarks.tables.pages import show
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.models.tasks import load_task
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json, write_text

N_PROMPTS = 20


def write_prompts(library, path, skip=range(0), rows=0):
    """A folder of tasks whose rows are prompts: `probe.jsonl` and `test.jsonl` of every adapter.

    Args:
        library: has the adapters and their rows.
        path: the folder.
        skip: rows of `probe.jsonl` that are no prompts.
        rows: number of rows with answers before the prompts, the first that are skipped; then
            `test.jsonl` is the library's.
    """
    for one in sorted((library / "adapters").iterdir()):
        task = load_task(library / "tasks" / one.name)
        asked = [row for i, row in enumerate(task.probe) if i not in skip][:N_PROMPTS]
        prompts = [{"messages": row["messages"][:-1]} if "messages" in row else
                   {"prompt": row["prompt"]} for row in asked]  # fmt: skip
        given = [task.probe[i] for i in skip][:rows]
        half = len(prompts) if rows else (len(prompts) + 1) // 2
        test = list(task.test) if rows else prompts[half:]
        for name, some in (("probe", [*given, *prompts[:half]]), ("test", test)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            write_text(path / one.name / f"{name}.jsonl", text)
    return str(path)


def measure(options, budget, directory):
    """One budget: the pack without rows, and its excess on held-out rows."""
    config = RunConfig(
        adapters=str(options.library / "adapters"), budget=budget,
        output=str(directory / f"{budget}-0-{options.case}"),
    )  # fmt: skip
    made = config
    if options.case == "prompts":
        made = config.replace(tasks=write_prompts(options.library, directory / "prompts"))
    pack = load_pack(run(made, until="pack", quiet=True).path("pack"))
    config = config.replace(
        tasks=str(options.library / "tasks"), test_examples=options.tests,
        output=str(directory / "judge"),
    )  # fmt: skip
    judge = run(config, until="convert", quiet=True)
    methods = {
        **ends(judge),
        "pack": BenchMethod(pack.nbytes, [{name: pack.load(name) for name in judge.library.names}]),
    }
    found = bench_methods(judge.library.scorer, methods, judge.library.held_out)["pack"]
    losses = {name: one["loss"] for name, one in found.pop("tasks").items()}
    return {"budget": budget, "case": options.case, **found, "tasks": losses}


def main():
    """Measure what is missing, and print."""
    parser = command_line(__doc__, __spec__, "without_rows.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--budgets", default="3,6,12,12.5%,3%")
    parser.add_argument("--case", choices=("weights", "prompts"), default="weights")
    parser.add_argument("--tests", type=int, default=30)
    parser.add_argument("--work", type=Path, help="run directories, to be used again")
    options = parser.parse_args()
    output, rows = options.output, []
    if output.exists():
        before = json.loads(output.read_text())
        rows = before["rows"] if before["tests"] == options.tests else []
    content = {"tests": options.tests, "rows": rows, "machine": machine()}
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        work = options.work or Path(directory)
        for budget in options.budgets.split(","):
            if (budget, options.case) in {(one["budget"], one["case"]) for one in rows}:
                print(f"{budget}: is in {output}; give another --output to measure it")
            else:
                rows.append(measure(options, budget, work))
                write_json(output, content)
                print(budget, f"{rows[-1]['excess']:.4f} {rows[-1]['kept']:.1%}", flush=True)
    show("without-rows", without_rows=content)


if __name__ == "__main__":
    main()
