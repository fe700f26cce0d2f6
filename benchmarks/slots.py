"""At most K adapters: clusterings, merge methods, rank and refining, on held-out rows.

    python benchmarks/slots.py --library DIR [--clusters 3,6,12] [--seeds 3] [--cases paper,default]

Every case is a whole `d2c-mlx run` with other options; a seed takes other probe rows of every task
(rows 0-9, 10-19, ...), never test rows. Losses are shared through one cache, so what two cases
have in common is evaluated once; seconds are therefore those of what was new. A run that was
stopped continues: cases that are in the results are not repeated. Results: results/slots.json.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import d2c_mlx  # noqa: F401  the fast BLAS first
from d2c_mlx.config import MERGE_METHODS, RunConfig
from d2c_mlx.doctor import machine
from d2c_mlx.files import write_json
from d2c_mlx.pipeline import run

RESULT = Path(__file__).parent / "results" / "slots.json"
CASES = {
    "paper": {"search": "paper"},
    "paper, ties": {"search": "paper", "merge_method": "ties"},
    "default": {},
    "auto": {"merge_method": "auto"},
    "rank 32": {"merge_rank": 32},
    "rank 32, auto": {"merge_rank": 32, "merge_method": "auto"},
    **{name: {"merge_method": name} for name in MERGE_METHODS if name != "linear"},
}
BASELINES = ("base", "individual", "merge-all", "random", "kmeans")


def probes_of(library, seed, n_examples, directory):
    """A tasks directory with the seed's probe rows and the same test rows; returns it."""
    for path in sorted((library / "tasks").iterdir()):
        rows = (path / "probe.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        some = rows[seed * n_examples : (seed + 1) * n_examples]
        if len(some) < n_examples:
            raise SystemExit(f"{path}: {len(rows)} probe rows are too few for seed {seed}")
        (directory / path.name).mkdir(parents=True)
        (directory / path.name / "probe.jsonl").write_text("".join(some), encoding="utf-8")
        test = (path / "test.jsonl").read_text(encoding="utf-8")
        (directory / path.name / "test.jsonl").write_text(test, encoding="utf-8")
    return directory


def row(methods, name):
    """What a table shows of one method."""
    keys = ("nbytes", "loss", "excess", "retention")
    worst = max(methods[name]["tasks"].items(), key=lambda item: item[1]["excess"])
    return {key: methods[name][key] for key in keys} | {"worst_task": worst[0]}


def measure(library, options, directory):
    """Run what is missing; results are written after every case."""
    results = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    done = {(one["clusters"], one["seed"], one["case"]) for one in results}
    for seed in range(options.seeds):
        tasks = probes_of(library, seed, options.examples, directory / f"tasks-{seed}")
        for n_clusters in map(int, options.clusters.split(",")):
            for case in options.cases.split(";"):
                if (n_clusters, seed, case) in done:
                    continue
                started = time.perf_counter()
                config = RunConfig(
                    adapters=str(library / "adapters"), tasks=str(tasks),
                    output=str(directory / f"{n_clusters}-{seed}"), budget=str(n_clusters),
                    probe_examples=options.examples, test_examples=options.tests,
                    random_seeds=options.random_seeds, seed=seed, **CASES[case],
                )  # fmt: skip
                ws = run(config, until="bench", quiet=True)
                methods = ws.read("bench.json")["methods"]
                merges = ws.read("merges.json")
                entry = {
                    "clusters": n_clusters, "seed": seed, "case": case,
                    "seconds": round(time.perf_counter() - started, 1),
                    "pack": row(methods, "pack"), "merges": merges,
                    **{name: row(methods, name) for name in BASELINES},
                }  # fmt: skip
                results.append(entry)
                settings = {name: getattr(options, name) for name in ("examples", "tests")}
                write_json(RESULT, {"settings": settings, "rows": results, "machine": machine()})
                print(n_clusters, seed, case, entry["pack"], entry["seconds"], flush=True)
    return results


def table(results):
    """Lines of Markdown: mean and spread over seeds."""
    lines = ["| K | case | excess | retention | seeds |", "|--:|---|--:|--:|--:|"]
    groups = {}
    for one in results:
        cases = [(one["case"], "pack")] + [(name, name) for name in BASELINES if name != "base"]
        for case, key in cases:
            rows = groups.setdefault((one["clusters"], case), {})
            rows[one["seed"]] = one[key]
    ordered = sorted(
        groups.items(), key=lambda item: (item[0][0], min(r["excess"] for r in item[1].values()))
    )
    for (n_clusters, case), rows in ordered:
        excess = [one["excess"] for one in rows.values()]
        kept = [one["retention"] for one in rows.values()]
        lines.append(
            f"| {n_clusters} | {case} | {spread(excess, '.4f')} | {spread(kept, '.1%')} |"
            f" {len(rows)} |"
        )
    return lines


def spread(values, form):
    """The mean, and the range of several seeds."""
    mean = format(sum(values) / len(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ({format(min(values), form)} to {format(max(values), form)})"


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--clusters", default="3,6,12")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--random-seeds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        results = measure(options.library, options, Path(directory))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
