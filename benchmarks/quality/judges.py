"""Which judge of a clustering sees what held-out rows see, before anything is searched with it.

    python -m benchmarks.quality.judges --library DIR [--adapters a,b,...] [--draws 0,1,2]

A cluster is merged as a run ships it, and its members' excess is measured on held-out rows: the
truth. Beside it stand the judges, which see the ten calibration rows of a draw: a merge by RegMean
or layer by layer, fitted on all rows or on one half and judged on the other ("crossed"), by the
loss of the given answers or by the divergence from each member's own predictions ("kl"). Of a few
adapters every cluster is measured, so that all partitions follow; of many, those of K-Means, of
random partitions and of what the estimates make of these. Each cluster is saved as it comes, and a
second call goes on. Results: results/judges.json.
"""

import json
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from benchmarks import command_line
from d2c_mlx.adapters.core_space import svd_features
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.cluster.partition import groups_of, kmeans, random_partition
from d2c_mlx.cluster.search import MergeEstimates, estimated_partition, improved
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.merge.library import Library, measure_losses
from d2c_mlx.merge.merging import merge, quick_merge
from d2c_mlx.merge.methods import MergeOptions
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import Task, load_task
from d2c_mlx.utils.device import machine
from d2c_mlx.utils.files import write_json

JUDGES = tuple(
    f"{merge_method}{crossed}{kl}"
    for merge_method in ("regmean", "layerwise")
    for crossed in ("", ", crossed")
    for kl in ("", ", kl")
)
# Judges that need no merge: cosines of dW, and what weakened adapters foretell.
WITHOUT_MERGE = ("similarity", "estimate")
# Adapters of which every cluster is measured.
FEW = 7


def read_draw(options, base, scorer, names, draw):
    """The library of one draw of calibration rows, and its two halves, with their losses."""
    n, tasks = options.examples, []
    adapters = [
        read_adapter(options.library / "adapters" / name, base.module_shapes) for name in names
    ]
    for name in names:
        rows = load_task(options.library / "tasks" / name)
        calibration = base.encode(name, rows.probe[draw * n : (draw + 1) * n])
        held_out = base.encode(name, rows.test[: options.tests])
        if min(len(calibration.examples) - n, len(held_out.examples) - options.tests):
            raise SystemExit(f"{name}: too few rows for draw {draw}")
        tasks.append(Task(name, calibration.halved(), held_out.halved(), rows))
    halves = [
        [replace(task, calibration=task.calibration.parts[i]) for task in tasks] for i in (0, 1)
    ]
    return [
        library.measured(measure_losses(library))
        for library in (Library(adapters, each, scorer) for each in (tasks, *halves))
    ]


def losses(library, adapter, sets):
    """Sums over targets of the adapter's loss on each set."""
    means = library.scorer.losses([(adapter, sets)], in_parts=True)[0]
    return means * [rows.n_targets for rows in sets]


def judge(libraries, taught, members):
    """One cluster: its truth and every judge's losses by member, per target; and seconds."""
    whole, *halves = libraries
    result, seconds = {}, {}
    n_targets = np.array([whole.tasks[i].calibration.n_targets for i in members])
    for name, make in (("regmean", quick_merge), ("layerwise", merge)):
        options, began = MergeOptions(name), time.perf_counter()
        adapter = make(whole, members, options).adapter
        seconds[name] = time.perf_counter() - began
        parts = [(adapter, i) for i in (0, 1)]
        began = time.perf_counter()
        kinds = [(name, parts)]
        if name == "layerwise" or len(whole.names) <= FEW:  # else it takes too long
            # The half that a merge was not fitted on.
            crossed = [(make(half, members, options).adapter, 1 - i)
                       for i, half in enumerate(halves)]  # fmt: skip
            seconds[f"{name}, crossed"] = time.perf_counter() - began
            kinds.append((f"{name}, crossed", crossed))
        for kind, jobs in kinds:
            own = [[halves[i].tasks[m].calibration for m in members] for _, i in jobs]
            teacher = [[taught[i][m] for m in members] for _, i in jobs]
            for suffix, sets in (("", own), (", kl", teacher)):
                sums = sum(losses(whole, merged, rows) for (merged, _), rows in zip(jobs, sets))
                result[kind + suffix] = (sums / n_targets).tolist()
        if name == "layerwise":
            held_out = [whole.tasks[i].held_out for i in members]
            tested = losses(whole, adapter, held_out)
            result["held out"] = (tested / [rows.n_targets for rows in held_out]).tolist()
    return {"members": members, **result, "seconds": {k: round(v, 1) for k, v in seconds.items()}}


def clusters_to_measure(options, library, estimates, draw):
    """Partitions to judge, which is None where all are; and the clusters that they need."""
    n, k = len(library.names), options.clusters
    if n <= FEW:
        sizes = range(2, n + 1)
        return None, [members for size in sizes for members in combinations(range(n), size)]
    features = svd_features(library.similarity)
    partitions = [kmeans(features, k, draw).labels, estimated_partition(estimates, k)]
    for seed in range(options.partitions // 2 - 1):
        labels = random_partition(n, k, seed).labels
        partitions += [labels, improved(estimates, labels)]
    members = [group for labels in partitions for group in groups_of(labels) if len(group) > 1]
    return partitions, list(dict.fromkeys(members))


def measure(options, results):
    """Measure what is missing; results are written after every cluster."""
    names = options.adapters.split(",") if options.adapters else sorted(
        path.name for path in (options.library / "adapters").iterdir())  # fmt: skip
    base = Model(options.model)
    scorer = Scorer(Engine(base))
    distiller = Distiller(base)
    for draw in map(int, options.draws.split(",")):
        key = f"{len(names)} adapters, draw {draw}"
        if len(names) > FEW:
            key += f", {options.clusters} clusters"
        libraries = read_draw(options, base, scorer, names, draw)
        whole, *halves = libraries
        estimates = MergeEstimates(whole.fading, whole.similarity)
        partitions, todo = clusters_to_measure(options, whole, estimates, draw)
        entry = results["draws"].setdefault(key, {
            "adapters": names, "examples": options.examples, "tests": options.tests,
            "partitions": partitions, "base": whole.losses.base.tolist(),
            "own": whole.losses.individual.tolist(),
            "similarity": whole.similarity.round(4).tolist(),
            "held out": [float(losses(whole, adapter, [task.held_out])[0] / task.held_out.n_targets)
                         for adapter, task in zip(whole.adapters, whole.tasks)],
            "clusters": [],
        })  # fmt: skip
        taught = [
            [distiller.with_teacher(adapter, task.calibration)
             for adapter, task in zip(half.adapters, half.tasks)]
            for half in halves
        ]  # fmt: skip
        done = {tuple(cluster["members"]) for cluster in entry["clusters"]}
        for members in todo:
            if members not in done:
                cluster = judge(libraries, taught, members)
                cluster["estimate"] = estimates.of(members).tolist()
                entry["clusters"].append(cluster)
                write_json(options.output, results)
                print(key, members, cluster["seconds"], flush=True)


def partitions_of(n, k):
    """All partitions of n adapters into k clusters, as labels in order of first appearance."""
    labels = [(0,)]
    for _ in range(n - 1):
        labels = [(*head, label) for head in labels for label in range(min(max(head) + 2, k))]
    return [each for each in labels if max(each) == k - 1]


def compare(entry, k):
    """The excess of partitions into k, and how each judge ranks them and which it picks.

    None before all clusters of a partition are measured.
    """
    n = len(entry["adapters"])
    clusters = {tuple(cluster["members"]): cluster for cluster in entry["clusters"]}
    own, held_out = np.array(entry["own"]), np.array(entry["held out"])
    gain = np.maximum(np.array(entry["base"]) - own, 0.05)
    cosines = np.array(entry["similarity"])
    names = [name for name in JUDGES if all(name in cluster for cluster in entry["clusters"])]
    judged = {}
    for labels in entry["partitions"] or partitions_of(n, k):
        groups = [group for group in groups_of(labels) if len(group) > 1]
        if not all(group in clusters for group in groups):
            continue
        row = dict.fromkeys(("truth", *WITHOUT_MERGE), 0.0)
        for group in groups:
            at, cluster = list(group), clusters[group]
            row["truth"] += sum(cluster["held out"] - held_out[at]) / n
            row["similarity"] += sum(1 - cosines[np.ix_(at, at)].mean(axis=0)) / n
            row["estimate"] += sum(cluster["estimate"]) / n
            for name in names:
                losses_of = np.array(cluster[name]) - (0 if name.endswith("kl") else own[at])
                row[name] = row.get(name, 0) + sum(losses_of) / n
                regret = f"{name}, by gain"
                row[regret] = row.get(regret, 0) + sum(losses_of / gain[at]) / n
        judged[tuple(labels)] = row
    if not judged:
        return None
    truth = np.array([row["truth"] for row in judged.values()])
    result = {"partitions": len(judged), "best": truth.min(), "median": float(np.median(truth)),
              "worst": truth.max(), "judges": {}}  # fmt: skip
    for name in next(iter(judged.values())):
        values = np.array([row[name] for row in judged.values()])
        if name != "truth":
            rho = float(spearmanr(values, truth).statistic)
            result["judges"][name] = {"rho": rho, "pick": float(truth[np.argmin(values)])}
    return result


def main():
    """Measure, and print a table by number of clusters: rank correlation, and the pick's excess."""
    parser = command_line(__doc__, __spec__, "judges.json")
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--model", help="default: the embedded one")
    parser.add_argument("--adapters", help="names, separated by commas; default: all")
    parser.add_argument("--draws", default="0,1,2", help="each takes other calibration rows")
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--tests", type=int, default=100)
    parser.add_argument("--clusters", type=int, default=3, help="of many adapters")
    parser.add_argument("--partitions", type=int, default=40, help="of many adapters")
    options = parser.parse_args()
    fresh = {"machine": machine(), "draws": {}}
    results = json.loads(options.output.read_text()) if options.output.exists() else fresh
    measure(options, results)
    for key, entry in results["draws"].items():
        for k in (2, 3) if len(entry["adapters"]) <= FEW else (options.clusters,):
            table = compare(entry, k)
            if table is None:
                continue
            ends = "{best:.4f} best, {median:.4f} median, {worst:.4f} worst".format(**table)
            print(f"{key}, {k} clusters, {table['partitions']} partitions: excess {ends}")
            for name, row in sorted(table["judges"].items(), key=lambda item: -item[1]["rho"]):
                print(f"  {row['rho']:6.2f} {row['pick']:8.4f}  {name}")


if __name__ == "__main__":
    main()
