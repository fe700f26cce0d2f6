"""One rank on all cores against two ranks on the same cores (ring on loopback).

`d2c-mlx run --until probe` on the same adapters, cold caches, alternating; seconds are those of the
stage (evaluations, messages, writing), not loading the model. losses.json must be the same bytes.
Two ranks are started by hand, and once more by mlx.launch, whose threads (0.32: one per rank waits
for a pipe that is always writable) keep cores busy themselves.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BIN = Path(sys.executable).parent


def probe(n_ranks, launcher, library, directory, examples):
    """`(seconds, bytes of losses.json)`."""
    command = [BIN / "d2c-mlx", "run", "--until", "probe", "--adapters", library / "adapters",
               "--tasks", library / "tasks", "--output", directory / "run",
               "--probe-examples", examples,
               "--test-examples", 1, "--budget", 1]  # fmt: skip
    environment = {**os.environ, "D2C_MLX_CACHE": str(directory / "cache")}
    if launcher:
        command = [BIN / "mlx.launch", "-n", n_ranks, "--backend", "ring", "--", *command]
    elif n_ranks > 1:
        directory.mkdir()
        hosts = [[f"127.0.0.1:{free_port()}"] for _ in range(n_ranks)]
        (directory / "hosts.json").write_text(json.dumps(hosts))
        environment["MLX_HOSTFILE"] = str(directory / "hosts.json")
    words = list(map(str, command))
    processes = [
        subprocess.Popen(
            words,
            env=environment | ({"MLX_RANK": str(rank)} if "MLX_HOSTFILE" in environment else {}),
            stdout=subprocess.DEVNULL,
        )
        for rank in range(1 if launcher else n_ranks)
    ]
    if any([process.wait() for process in processes]):
        raise SystemExit(f"failed: {' '.join(words)}")
    record = json.loads((directory / "run" / ".stages" / "probe.json").read_text())
    return record["seconds"], (directory / "run" / "losses.json").read_bytes()


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def measure(library, n_adapters, n_examples, repeats):
    """Median seconds of one rank, of two, and of two under mlx.launch; equal losses.json or not."""
    cases = {"one": (1, False), "two": (2, False), "mlx.launch": (2, True)}
    seconds, losses = {name: [] for name in cases}, set()
    with tempfile.TemporaryDirectory() as directory:
        few = Path(directory) / "library"
        for path in sorted((library / "adapters").iterdir())[:n_adapters]:
            shutil.copytree(path, few / "adapters" / path.name)
            shutil.copytree(library / "tasks" / path.name, few / "tasks" / path.name)
        for repeat in range(repeats):
            for name, (n_ranks, launcher) in cases.items():
                here = Path(directory) / f"{name}-{repeat}"
                took, content = probe(n_ranks, launcher, few, here, n_examples)
                seconds[name].append(took)
                losses.add(content)
    medians = {name: statistics.median(one) for name, one in seconds.items()}
    return {
        "ranks_adapters": n_adapters, "ranks_seconds": medians,
        "ranks_ratio": medians["one"] / medians["two"], "ranks_same_bytes": len(losses) == 1,
    }  # fmt: skip
