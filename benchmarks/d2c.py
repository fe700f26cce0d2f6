"""How many of the evaluations that a full D2C asks for are done.

D2C on every adapter of a library with restarts, from a cold cache. An evaluation is one adapter
(or merge) on the probe examples of one task. Asked for is what the loop of the paper asks when it
remembers nothing: in every round of every start each cluster's line search and each cluster's
merge on all tasks. The count does not depend on the number of examples, the seconds do; they
include merging, tokenized rows and loaded adapters are there before.

    python benchmarks/d2c.py --library ../shared/library --examples 3
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import d2c_mlx  # noqa: F401  the fast BLAS first
from d2c_mlx.cluster import d2c
from d2c_mlx.config import RunConfig
from d2c_mlx.doctor import machine
from d2c_mlx.pipeline import run
from d2c_mlx.probe import Counts


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=Path("examples/demo"))
    parser.add_argument("--clusters", type=int, default=6)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--examples", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ["D2C_MLX_CACHE"] = directory
        config = RunConfig(
            adapters=str(options.library / "adapters"), tasks=str(options.library / "tasks"),
            output=str(Path(directory) / "run"), budget=str(options.clusters),
            probe_examples=options.examples, test_examples=1, restarts=options.restarts,
        )  # fmt: skip
        ws = run(config, until="probe")
        counts = ws.evaluator.counts = Counts()
        searches, again = {}, 0

        def merge(members):
            """Merge, and count what a line search would ask when its members come back."""
            nonlocal again
            if members in searches:
                again += searches[members]
                return ws.merge(members)
            before = counts.asked
            merged = ws.merge(members)
            searches[members] = counts.asked - before
            return merged

        problem = dataclasses.replace(ws.problem, merge=merge)
        started = time.perf_counter()
        found = d2c(problem, options.clusters, restarts=options.restarts)
        seconds = time.perf_counter() - started
        asked = counts.asked + again
        result = {
            "n_adapters": problem.n, "n_clusters": options.clusters, "restarts": options.restarts,
            "starts": found.starts, "asked": asked, "done": counts.done,
            "ratio": round(asked / counts.done, 2), "seconds": round(seconds, 1),
            "tokens": counts.tokens, "merges": len(searches), "machine": machine(),
        }  # fmt: skip
    print("| starts | merges | evaluations asked for | done | ratio | seconds |")
    print("|--:|--:|--:|--:|--:|--:|")
    print(f"| {len(found.starts)} | {len(searches)} | {asked} | {counts.done} |"
          f" {result['ratio']} | {seconds:.0f} |")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
