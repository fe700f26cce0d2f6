"""Seconds, evaluations and memory of clustering against the number of adapters, by estimates.

    python -m benchmarks.speed.search --library DIR [--sizes 24,50,100,200] [--alone 200,1000]

N adapters into N / 8 slots with one short calibration row each, from a cold cache; real adapters,
and copies with 5 % noise where they run out. Seconds are those of the stages' records, peak memory
is the process's. `--alone` is the search over partitions without a model, estimates given. Results:
results/search.json, written after every size.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import command_line
from benchmarks.speed.growth import grow
from d2c_mlx.cluster.partition import Fading
from d2c_mlx.cluster.search import STRENGTHS, MergeEstimates, estimated_partition
from d2c_mlx.models.model import Model
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

STAGES = ("convert", "probe", "cluster")


def clustered(library, n):
    """Cluster n adapters into n / 8 slots."""
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        grow(library, here, n, Model(), 160)
        os.environ["D2C_MLX_CACHE"] = str(here)
        output = run(RunConfig(
            adapters=str(here / "adapters"), tasks=str(here / "tasks"), output=str(here / "run"),
            budget=str(max(1, n // 8)), probe_examples=1, test_examples=1,
        ), until="cluster", quiet=True).output  # fmt: skip
        records = {
            stage: json.loads((output / ".stages" / f"{stage}.json").read_text())
            for stage in STAGES
        }
        methods = json.loads((output / "clusters.json").read_text())["methods"]
    return {
        "n": n,
        "seconds": {stage: one["seconds"] for stage, one in records.items()},
        "evaluations": {stage: one["evaluations"]["done"] for stage, one in records.items()},
        "proposals": len(methods["d2c"][0]["history"]),
        "peak_mb": peak(),
    }


def alone(n):
    """The search for n adapters in n / 10 slots with random estimates."""
    rng = np.random.default_rng(0)
    regrets = np.sort(rng.uniform(0.01, 0.6, (n, len(STRENGTHS))), axis=1)[:, ::-1]
    alike = rng.normal(0, 0.05, (n, n))
    estimates = MergeEstimates(Fading(STRENGTHS, regrets), (alike + alike.T) / 2)
    started = time.perf_counter()
    labels = estimated_partition(estimates, n // 10)
    seconds = round(time.perf_counter() - started, 2)
    return {"n": n, "slots": len(set(labels)), "seconds": seconds, "peak_mb": peak()}


def peak():
    """Peak memory of this process in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main():
    """Measure, each size in a process of its own, and print."""
    parser = command_line(__doc__, __spec__, "search.json")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--sizes", default="24,50,100,200")
    parser.add_argument("--alone", default="200,1000")
    parser.add_argument("--one", help="measure this one and print it: alone-N or N")
    options = parser.parse_args()
    if options.one:
        kind, _, n = options.one.rpartition("-")
        print(json.dumps(alone(int(n)) if kind else clustered(options.library, int(n))))
        return
    result = {"machine": machine(), "alone": [], "clustered": []}
    wanted = [("alone", f"alone-{n}") for n in options.alone.split(",") if n]
    wanted += [("clustered", n) for n in options.sizes.split(",") if n]
    for kind, name in wanted:
        arguments = [
            "--one",
            name,
            *(["--library", str(options.library)] if options.library else []),
        ]
        command = [sys.executable, "-m", "benchmarks.speed.search", *arguments]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result[kind].append(json.loads(said.splitlines()[-1]))
        write_json(options.output, result)
        print(result[kind][-1], flush=True)


if __name__ == "__main__":
    main()
