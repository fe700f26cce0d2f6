"""One rank on all cores against two ranks on the same cores (ring on loopback).

`d2c-mlx probe` on the same adapters, cold caches, alternating; seconds are those of the stage
(evaluations, messages, writing), not loading the model. losses.json must be equal to the byte.

    python benchmarks/ranks.py --library ../shared/library --adapters 4
"""

import argparse
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


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seconds, losses = {1: [], 2: []}, set()
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "library"
        for path in sorted((options.library / "adapters").iterdir())[: options.adapters]:
            shutil.copytree(path, library / "adapters" / path.name)
            shutil.copytree(options.library / "tasks" / path.name, library / "tasks" / path.name)
        for repeat in range(options.repeats):
            for n_ranks in seconds:
                here = Path(directory) / f"{n_ranks}-{repeat}"
                took, content = probe(n_ranks, library, here, options.examples)
                seconds[n_ranks].append(took)
                losses.add(content)
    print("| ranks | seconds (median) |\n|--:|--:|")
    for n_ranks, all_seconds in seconds.items():
        print(f"| {n_ranks} | {statistics.median(all_seconds):.1f} |")
    ratio = statistics.median(seconds[1]) / statistics.median(seconds[2])
    print(json.dumps({"ratio": round(ratio, 2), "seconds": seconds, "same": len(losses) == 1}))


if __name__ == "__main__":
    main()
