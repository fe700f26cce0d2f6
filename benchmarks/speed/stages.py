"""Where the time of a run goes, stage by stage, in this checkout and in an older one.

    python -m benchmarks.speed.stages --before DIR [--library DIR] [--budgets 2,12.5%]
        [--until cluster]

DIR is a checkout of an earlier commit with an environment in `.venv`. Every stage is a command of
its own, from a cold cache, so each includes starting and loading the model; CPU seconds are those
of all its threads. Results: results/stages.json, written after every run; one that is there is not
repeated.
"""

import json
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from benchmarks import command_line
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

STAGES = ("probe", "cluster", "plan", "merge", "pack", "bench", "report")


def timed(command, environment):
    """Seconds by the clock and by the CPU of a command."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(time.perf_counter() - started, 1), round(cpu, 1)


def staged(checkout, library, budget, until, here):
    """A row per stage of one run, up to one."""
    options = [f"--adapters={library}/adapters", f"--tasks={library}/tasks", f"--budget={budget}",
               f"--output={here}/run", "--probe-examples=4", "--test-examples=8",
               "--baselines=kmeans"]  # fmt: skip
    environment = {**os.environ, "D2C_MLX_CACHE": f"{here}/cache"}
    skipped = ("cluster", "merge") if "%" in budget else ("plan",)
    for stage in STAGES[: STAGES.index(until) + 1]:
        if stage not in skipped:
            command = [checkout / ".venv/bin/d2c-mlx", stage, *options]
            seconds, cpu = timed(list(map(str, command)), environment)
            record = json.loads((here / "run/.stages" / f"{stage}.json").read_text())
            yield {"budget": budget, "stage": stage, "seconds": seconds, "cpu_seconds": cpu,
                   "evaluations": record["evaluations"]["done"],
                   "tokens": record["evaluations"]["tokens"]}  # fmt: skip


def main():
    """Measure and print."""
    parser = command_line(__doc__, __spec__, "stages.json")
    parser.add_argument("--before", type=Path, required=True, help="checkout of an earlier commit")
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--budgets", default="2,12.5%", help="adapters, or percent of the bytes")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    options = parser.parse_args()
    result = {"machine": machine(), "rows": []}
    if options.output.exists():
        result["rows"] = json.loads(options.output.read_text())["rows"]
    there = {(row["budget"], row["checkout"]) for row in result["rows"]}
    for budget in options.budgets.split(","):
        for name, checkout in (("before", options.before), ("now", Path())):
            if (budget, name) in there:
                print(f"{budget}, {name}: is in {options.output}; give another --output")
                continue
            with tempfile.TemporaryDirectory() as directory:
                library = options.library.resolve()
                for row in staged(checkout.resolve(), library, budget, options.until,
                                  Path(directory)):  # fmt: skip
                    result["rows"].append({"checkout": name, **row})
                    print(result["rows"][-1], flush=True)
            write_json(options.output, result)


if __name__ == "__main__":
    main()
