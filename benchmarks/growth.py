"""How the time of every stage grows with the number of adapters.

Real adapters; where they run out, copies with 5 % noise on every factor, and other rows of the
same tasks. K stays the same. Seconds of a stage are those of its record in the run directory: all
of the stage, with reading and writing. The exponent is the slope of log seconds over log N.

    python benchmarks/growth.py --library ../shared/library --sizes 8,16,32,64
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import d2c_mlx  # noqa: F401  the fast BLAS first

import mlx.core as mx  # isort: skip
import numpy as np

from d2c_mlx.adapter import LoRA
from d2c_mlx.config import RunConfig
from d2c_mlx.convert import find_adapters, read_adapter
from d2c_mlx.doctor import machine
from d2c_mlx.model import BaseModel
from d2c_mlx.pipeline import STAGES, run


def grow(library, directory, n, base, width):
    """Write n adapters and their tasks: a probe and a test row of at most `width` characters."""
    paths = list(find_adapters(library / "adapters").values())
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


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--sizes", default="8,16,32,64")
    parser.add_argument("--clusters", type=int, default=6)
    parser.add_argument("--width", type=int, default=160, help="characters of a row")
    options = parser.parse_args()
    sizes, records = [int(n) for n in options.sizes.split(",")], {}
    with tempfile.TemporaryDirectory() as directory:
        os.environ["D2C_MLX_CACHE"] = directory
        base = BaseModel()
        for n in sizes:
            here = Path(directory) / str(n)
            grow(options.library, here, n, base, options.width)
            os.environ["D2C_MLX_CACHE"] = str(here)  # a cold cache of losses
            output = run(RunConfig(
                adapters=str(here / "adapters"), tasks=str(here / "tasks"),
                output=str(here / "run"), budget=str(options.clusters), init=("adapters",),
                rounds=2, random_seeds=1,
            )).output  # fmt: skip
            records[n] = {
                stage: json.loads((output / ".stages" / f"{stage}.json").read_text())
                for stage in STAGES
            }
            print(n, {stage: one["seconds"] for stage, one in records[n].items()}, flush=True)
    print(
        f"| stage | {' | '.join(f'N = {n}' for n in sizes)} | exponent | evaluations | exponent |"
    )
    print("|---|" + "--:|" * (len(sizes) + 3))
    result = {}
    for stage in STAGES:
        seconds = [max(records[n][stage]["seconds"], 1e-2) for n in sizes]
        done = [records[n][stage]["evaluations"]["done"] for n in sizes]
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        rate = np.polyfit(np.log(sizes), np.log(done), 1)[0] if all(done) else float("nan")
        result[stage] = {"seconds": seconds, "exponent": slope, "evaluations": done}
        cells = " | ".join(f"{one:.1f}" for one in seconds)
        print(f"| {stage} | {cells} | {slope:.2f} | {', '.join(map(str, done))} | {rate:.2f} |")
    print(json.dumps({"sizes": sizes, "stages": result, "machine": machine()}))


if __name__ == "__main__":
    main()
