"""Seconds of every stage against the number of adapters.

Real adapters; where they run out, copies with 5 % noise on every factor, and other rows of the
same tasks. K stays the same, and the paper's loop chooses. The published results began with single
adapters, took two rounds at most and measured the whole table of tasks by adapters, which a run
cannot do any more. Seconds of a stage are those of its record in the run directory: all of the
stage, with reading and writing, from a cold cache. The exponent is the slope of log seconds over
log N.
"""

import json
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import LoRA
from d2c_mlx.adapters.reading import find_adapters, read_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.pipeline import STAGES as ALL
from d2c_mlx.pipeline import run
from d2c_mlx.run.config import RunConfig

# For slots, with rows, unrefined.
STAGES = [stage for stage in ALL if stage not in ("answer", "plan", "refine")]


def grow(library, directory, n, base, width):
    """Write n adapters and their tasks: a probe and a test row of at most `width` characters."""
    paths = [one.path for one in find_adapters(library / "adapters")]
    rng = np.random.default_rng(0)
    for i in range(n):
        path, copy = paths[i % len(paths)], i // len(paths)
        adapter = read_adapter(path, base.module_shapes)
        if copy:
            adapter = type(adapter)(
                adapter.name, {key: noisy(lora, rng) for key, lora in adapter.modules.items()}
            )
        name = f"{i:03d}-{path.name}"
        adapter.save(directory / "adapters" / name, base.n_layers)
        (directory / "tasks" / name).mkdir(parents=True)
        for kind in ("probe", "test"):
            file = library / "tasks" / path.name / f"{kind}.jsonl"
            rows = sorted(file.read_text(encoding="utf-8").splitlines(), key=len)
            row = [row for row in rows if len(row) <= width][copy : copy + 1] or rows[copy:][:1]
            (directory / "tasks" / name / f"{kind}.jsonl").write_text(row[0] + "\n", "utf-8")


def noisy(lora, rng):
    """The factors with 5 % noise."""
    a, b = (np.array(x.astype(mx.float32)) for x in (lora.a, lora.b))
    a, b = (mx.array((x + 0.05 * x.std() * rng.normal(size=x.shape)).astype("f")) for x in (a, b))
    return LoRA(a.astype(lora.a.dtype), b.astype(lora.b.dtype), lora.scale)


def measure(library, sizes, n_clusters, width):
    """Seconds and evaluations of every stage at every size, and the fitted exponents."""
    records, before = {}, os.environ.get("D2C_MLX_CACHE")
    with tempfile.TemporaryDirectory() as directory:
        base = Model()
        for n in sizes:
            here = Path(directory) / str(n)
            grow(library, here, n, base, width)
            os.environ["D2C_MLX_CACHE"] = str(here)  # a cold cache of losses
            output = run(RunConfig(
                adapters=str(here / "adapters"), tasks=str(here / "tasks"),
                output=str(here / "run"), budget=str(n_clusters), search="paper",
                            ), quiet=True).output  # fmt: skip
            records[n] = {
                stage: json.loads((output / ".stages" / f"{stage}.json").read_text())
                for stage in STAGES
            }
            print(n, {stage: one["seconds"] for stage, one in records[n].items()}, flush=True)
    os.environ.pop("D2C_MLX_CACHE")
    if before is not None:
        os.environ["D2C_MLX_CACHE"] = before
    growth = {}
    for stage in STAGES:
        seconds = [max(records[n][stage]["seconds"], 1e-2) for n in sizes]
        done = [records[n][stage]["evaluations"]["done"] for n in sizes]
        slopes = [
            float(np.polyfit(np.log(sizes), np.log(one), 1)[0]) if all(one) else None
            for one in (seconds, done)
        ]
        growth[stage] = {
            "seconds": seconds, "exponent": slopes[0],
            "evaluations": done, "evaluations_exponent": slopes[1],
        }  # fmt: skip
    return {"growth_sizes": list(sizes), "growth_clusters": n_clusters, "growth": growth}
