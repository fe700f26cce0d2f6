"""One rank on all cores against two ranks on the same cores (ring on loopback).

`d2c-mlx probe` on the same adapters, cold caches, alternating; seconds are those of the stage
(evaluations, messages, writing), not loading the model. losses.json must be equal to the byte.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent


def probe(n_ranks, library, directory, examples):
    """`(seconds, bytes of losses.json)`."""
    command = [BIN / "d2c-mlx", "probe", "--quiet", "--adapters", library / "adapters", "--tasks",
               library / "tasks", "--output", directory / "run", "--probe-examples", examples,
               "--test-examples", 1, "--budget", 1]  # fmt: skip
    if n_ranks > 1:
        command = [BIN / "mlx.launch", "-n", n_ranks, "--backend", "ring", "--", *command]
    environment = {**os.environ, "D2C_MLX_CACHE": str(directory / "cache")}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True)
    record = json.loads((directory / "run" / ".stages" / "probe.json").read_text())
    return record["seconds"], (directory / "run" / "losses.json").read_bytes()


def measure(library, n_adapters, n_examples, repeats):
    """Median seconds of one rank and of two, and whether all losses.json are equal."""
    seconds, losses = {1: [], 2: []}, set()
    with tempfile.TemporaryDirectory() as directory:
        few = Path(directory) / "library"
        for path in sorted((library / "adapters").iterdir())[:n_adapters]:
            shutil.copytree(path, few / "adapters" / path.name)
            shutil.copytree(library / "tasks" / path.name, few / "tasks" / path.name)
        for repeat in range(repeats):
            for n_ranks in seconds:
                here = Path(directory) / f"{n_ranks}-{repeat}"
                took, content = probe(n_ranks, few, here, n_examples)
                seconds[n_ranks].append(took)
                losses.add(content)
    one, two = (statistics.median(seconds[n]) for n in (1, 2))
    return {
        "ranks_adapters": n_adapters, "ranks_seconds": [one, two], "ranks_ratio": one / two,
        "ranks_same_bytes": len(losses) == 1,
    }  # fmt: skip
