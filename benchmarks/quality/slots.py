"""At most K adapters: clusterings, merge methods, rank and refining, on held-out rows.

    python -m benchmarks.quality.slots --library DIR [--clusters 3,6,12] [--seeds 0,1,2]
        [--cases A;B]

A seed takes other probe rows of every task (rows 0-9, 10-19, ...), never test rows. A case is
a whole `d2c-mlx run` with other options up to its pack, or clusters merged another way: those of
the default search ("estimates: tsv") or of K-Means ("kmeans: layerwise"). Losses are shared through
one cache, so what two cases have in common is evaluated once; seconds are those of what was new. A
run that was stopped continues: cases that are in the results are not repeated. Results:
results/slots.json.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks import command_line
from benchmarks.common import ends, slug
from benchmarks.quality.without_rows import write_prompts
from benchmarks.tables.pages import show
from d2c_mlx.adapters.core_space import svd_features
from d2c_mlx.adapters.reading import find_adapters, read_adapter
from d2c_mlx.cluster.partition import Clusters, canonical, kmeans, random_partition
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods
from d2c_mlx.merge.merging import merge
from d2c_mlx.merge.methods import METHODS
from d2c_mlx.packs.pack import load_pack
from d2c_mlx.pipeline import run
from d2c_mlx.plugins import MERGE_METHODS, names
from d2c_mlx.run.config import RunConfig
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

# By what all is merged that names nothing else: cheaper than the default, `layerwise`, for which
# the clusters are the same.
PLAIN = {"merge_method": "regmean++"}
RUNS = {
    # The default of a run, merged layer by layer.
    "estimates": {},
    "paper": {**PLAIN, "search": "paper"},
}
# Rows of the results that no run can measure any more: the paper's loop from the best of single
# adapters, K-Means and a random partition; the search by moves, and its clusters; refining by the
# rows' answers besides the divergence, and with a step chosen by rows that were held back.
PAST = (
    "paper, linear",
    "paper, ties",
    "moves",
    "estimates: refined, cross entropy",
    "estimates: refined with prompts, cross entropy",
    "estimates: refined, held back",
)
# How clusters are merged another way: by each method, plug-ins included.
MERGES = {name: {"merge_method": name} for name in (*METHODS, *names(MERGE_METHODS))}
# Options of a whole run on clusters that are known. Prompts are those of rows of other draws.
LEVERS = {
    "with prompts": {"tasks": "prompts"},
    "refined": {"refine": True},
    "refined with prompts": {"refine": True, "tasks": "prompts"},
    "rank 16": {"merge_rank": 16},
    "rank 16, refined": {"merge_rank": 16, "refine": True},
    "rank 32": {"merge_rank": 32},
    "rank 32, refined": {"merge_rank": 32, "refine": True},
    "rank 64": {"merge_rank": 64},
    "rank 64, refined": {"merge_rank": 64, "refine": True},
    "layerwise": {"merge_method": "layerwise"},
}
BASELINES = ("individual", "merge-all", "kmeans", "random")
CASES = (
    *BASELINES, "merge-all: layerwise", "kmeans: layerwise", "random: layerwise", *RUNS,
    *(f"estimates: {name}" for name in (*MERGES, *LEVERS)),
)  # fmt: skip


def probes_of(library, seed, n_examples, directory):
    """The seed's probe rows, and the same test rows, of every adapter's task; returns where."""
    for adapter in find_adapters(library / "adapters"):
        path = library / "tasks" / adapter.name
        rows = (path / "probe.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        some = rows[seed * n_examples : (seed + 1) * n_examples]
        if len(some) < n_examples:
            raise SystemExit(f"{path}: {len(rows)} probe rows are too few for seed {seed}")
        (directory / path.name).mkdir(parents=True, exist_ok=True)
        (directory / path.name / "probe.jsonl").write_text("".join(some), encoding="utf-8")
        test = (path / "test.jsonl").read_text(encoding="utf-8")
        (directory / path.name / "test.jsonl").write_text(test, encoding="utf-8")
    return directory


def served(session, clustering, changes):
    """The adapter of every task when the clusters are merged with other options; and the scales."""
    config = session.config.replace(**{**PLAIN, **changes})
    merges = [merge(session.library, members, config.merging) for members in clustering.groups]
    adapters = {
        session.library.names[i]: merges[k].adapter for i, k in enumerate(clustering.labels)
    }
    return adapters, [[one.method, one.scale] for one in merges]


def packed(session):
    """The adapter of every task of the run's pack; and what was merged and refined."""
    pack = load_pack(session.path("pack"))
    merges = [[one["method"], one["scale"]] for one in session.read("merges.json")]
    adapters = {name: read_adapter(pack.path / pack.tasks[name]) for name in session.library.names}
    return adapters, merges


def pulled(session, case, clustering, i, options):
    """A run with a lever's options on the case's i-th clustering, in a directory of its own."""
    how, names = case.partition(": ")[2], session.library.names
    start = session.output.name.removesuffix("estimates")
    place = session.output.with_name(f"{start}{slug(case)}{f'-{i}' if i else ''}")
    clusters = place.with_suffix(".clusters.json")
    write_json(clusters, [[names[i] for i in group] for group in clustering.groups])
    changes = dict(LEVERS[how])
    if "tasks" in changes:
        n, seed = options.examples, session.config.seed
        used = range(seed * n, (seed + 1) * n)
        changes["tasks"] = write_prompts(options.library, place.with_suffix(".tasks"), used, n)
    config = session.config.replace(**changes, clusters=str(clusters), output=str(place))
    return run(config, until="pack", quiet=True)


def partitions(session, kind, results, options):
    """The clusterings of a kind whose clusters are merged here, not by a run."""
    if kind == "estimates":
        return [clusters_found(session, results)]
    n, k, seed = len(session.library.names), session.capacity.n_clusters, session.config.seed
    if kind == "random":
        return [random_partition(n, k, seed * options.random_seeds + i)
                for i in range(options.random_seeds)]  # fmt: skip
    if kind == "merge-all":
        return [Clusters("merge-all", (0,) * n)]
    if kind == "kmeans":
        return [kmeans(svd_features(session.library.similarity), k, seed)]
    return [Clusters("individual", tuple(range(n)))]


def clusters_found(session, results):
    """The clustering of the row `estimates` with the same seed and number of clusters."""
    k, seed = session.capacity.n_clusters, session.config.seed
    for one in results:
        if (one["clusters"], one["seed"], one["case"]) == (k, seed, "estimates"):
            (groups,) = one["clusters_of"]
            labels = [
                i for name in session.library.names for i, g in enumerate(groups) if name in g
            ]
            return Clusters("d2c", canonical(labels), *one["probe_regret"])
    raise SystemExit(f"{k} clusters, seed {seed}: measure 'estimates' first")


def measure(config, case, results, options):
    """One case: its row."""
    started = time.perf_counter()
    kind, _, how = case.partition(": ")
    if case in RUNS:
        session = run(config.replace(**RUNS[case]), until="pack", quiet=True)
        (saved,) = session.read("clusters.json")["methods"]["d2c"]
        clusterings = [Clusters(**{**saved, "labels": tuple(saved["labels"])})]
        found = [packed(session)]
    else:
        session = run(config, until="probe", quiet=True)
        clusterings = partitions(session, kind, results, options)
        if how in LEVERS:
            pulls = [pulled(session, case, one, i, options) for i, one in enumerate(clusterings)]
            found, session = [packed(one) for one in pulls], pulls[0]
        else:
            changes = MERGES.get(how, {})
            found = [served(session, one, changes) for one in clusterings]
    methods = {
        **ends(session),
        **{f"{i}": BenchMethod(0, [adapters]) for i, (adapters, _) in enumerate(found)},
    }
    benched = bench_methods(session.library.scorer, methods, session.library.held_out)
    rows = [benched[f"{i}"] for i in range(len(found))]
    return {
        "excess": sum(one["excess"] for one in rows) / len(rows),
        "kept": sum(one["kept"] for one in rows) / len(rows),
        "each_excess": [one["excess"] for one in rows],
        "each_kept": [one["kept"] for one in rows],
        "tasks": {
            name: [one["tasks"][name]["loss"] for one in rows] for name in session.library.names
        },
        "base": {name: benched["base"]["tasks"][name]["loss"] for name in session.library.names},
        "clusters_of": [
            [[session.library.names[i] for i in g] for g in one.groups] for one in clusterings
        ],
        "probe_regret": [one.regret for one in clusterings],
        "merges": [merges for _, merges in found],
        "asked_tokens": session.library.scorer.counts["tokens"],
        "seconds": round(time.perf_counter() - started, 1),
        "search": searched(session) if case in RUNS else None,
        "stages": stages(session, ("merge", "refine")),
    }


def stages(session, names):
    """Stage -> seconds, of those that the case's first run had."""
    return {name: record(session, name)["seconds"] for name in names
            if (session.output / ".stages" / f"{name}.json").exists()}  # fmt: skip


def record(session, name):
    """Read `.stages/<name>.json` of a run: seconds, evaluations."""
    return json.loads((session.output / ".stages" / f"{name}.json").read_text())


def searched(session):
    """Evaluations of an adapter on one task that finding the clusters of a run asked for.

    Tokens and seconds, merging too, are those of what was not in the cache.
    """
    records = [record(session, name) for name in ("probe", "cluster")]
    probe, cluster = (one["evaluations"]["asked"] for one in records)
    return {
        # The probe asks for the halves of every task's rows one by one.
        "evaluations": probe // 2 + cluster,
        "tokens": sum(one["evaluations"]["tokens"] for one in records),
        "seconds": round(sum(one["seconds"] for one in records), 1),
    }


def measured_before(output, settings):
    """Results that are there already.

    Raises:
        SystemExit: they are of other rows; in one line.
    """
    if not output.exists():
        return []
    before = json.loads(output.read_text())
    if before["settings"] != settings:
        raise SystemExit(
            f"{output}: found {before['settings']}, expected {settings}; give --examples and"
            " --tests as there, or another --output"
        )
    return before["rows"]


def measure_all(options, directory):
    """Run what is missing; results are written after every case."""
    cases = options.cases.split(";")
    if past := [case for case in cases if case.startswith(PAST)]:
        raise SystemExit(f"--cases: found {'; '.join(past)}, which no run can measure any more")
    output, settings = options.output, {"examples": options.examples, "tests": options.tests}
    results = measured_before(output, settings)
    done = {(one["clusters"], one["seed"], one["case"]) for one in results}
    for seed in map(int, options.seeds.split(",")):
        tasks = probes_of(options.library, seed, options.examples, directory / f"tasks-{seed}")
        for n_clusters in map(int, options.clusters.split(",")):
            for case in cases:
                if (n_clusters, seed, case) in done:
                    continue
                place = case if case in RUNS else "estimates"
                config = RunConfig(
                    adapters=str(options.library / "adapters"), tasks=str(tasks),
                    output=str(directory / f"{n_clusters}-{seed}-{slug(place)}"),
                    budget=str(n_clusters), probe_examples=options.examples,
                    test_examples=options.tests, seed=seed, model=options.model,
                )  # fmt: skip
                entry = {"clusters": n_clusters, "seed": seed, "case": case}
                entry |= measure(config, case, results, options)
                results.append(entry)
                write_json(output, {"settings": settings, "rows": results, "machine": machine()})
                print(n_clusters, seed, case, f"{entry['excess']:.4f} {entry['kept']:.1%}",
                      entry["merges"][0][:6], entry["seconds"], flush=True)  # fmt: skip
    return results


def main():
    """Measure and print."""
    parser = command_line(__doc__, __spec__, "slots.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--clusters", default="3,6,12")
    parser.add_argument("--seeds", default="0,1,2", help="each takes other probe rows")
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=30)
    parser.add_argument("--random-seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="run directories, to be used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        os.environ.setdefault("D2C_MLX_CACHE", directory)
        results = measure_all(options, options.work or Path(directory))
    show("slots", slots={"rows": results})


if __name__ == "__main__":
    main()
