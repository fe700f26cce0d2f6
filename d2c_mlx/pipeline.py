"""The whole story: adapters + a few examples + a budget -> a pack, and what it is worth.

    convert -> probe -> cluster -> merge (-> refine) -> pack -> bench -> report
    convert -> probe -> plan                         -> pack -> bench -> report    (budget in bytes)

Each stage reads artifacts of the run directory and writes its own; a stage whose inputs did not
change is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.cluster.completion import nearest, others_needed
from d2c_mlx.cluster.d2c import d2c
from d2c_mlx.cluster.partition import Clustering, kmeans, merge_all, random_partition
from d2c_mlx.compress.planner import make_plan, measure, planned
from d2c_mlx.evaluate.answers import answer_metrics, answer_rows
from d2c_mlx.evaluate.distributed import leading
from d2c_mlx.evaluate.evaluator import probe_table
from d2c_mlx.evaluate.heldout import Method, bench_methods
from d2c_mlx.packs.pack import MANIFEST, load_pack
from d2c_mlx.packs.write import write_compact_pack, write_pack
from d2c_mlx.phone.result import read_phone
from d2c_mlx.report.report import render_html, render_markdown
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.doctor import provenance
from d2c_mlx.run.records import check_pack, expect_pack
from d2c_mlx.run.refine_stage import refine_cluster, refine_inputs
from d2c_mlx.run.workspace import Workspace
from d2c_mlx.utils.errors import InputWarning
from d2c_mlx.utils.files import hash_file, remove_dir, write_dir, write_json, write_text
from d2c_mlx.utils.lock import locked

__all__ = ["STAGES", "run"]


def run(config: RunConfig, until: str = "report", quiet: bool = False) -> Workspace:
    """Run every stage up to and including `until`; what is already done is kept.

    Under `mlx.launch` only rank 0 may call this; the others call `ranks.serve`.

    Raises:
        InputError: bad input, all problems at once; nothing is written.
        D2CError: a stage failed, or another process is at work in the run directory.
    """
    with leading() as group:
        workspace = Workspace(config, quiet, group)
        with locked(workspace.output):
            if list(STAGES).index(until) >= list(STAGES).index("pack"):
                check_pack(workspace.output)
            for name, stage in STAGES.items():
                if name not in _WITHOUT[config.planned]:
                    stage(workspace)
                if name == until:
                    break
    return workspace


def convert(ws: Workspace) -> None:
    """Input adapters -> `adapters/<name>/`, exact, in mlx-lm's layout."""

    def body() -> None:
        with write_dir(ws.path("adapters")) as directory:
            for adapter in ws.inputs:
                adapter.save(directory / adapter.name, ws.base.n_layers)

    options = [[adapter.name, adapter.base, adapter.digest] for adapter in ws.inputs]
    ws.stage("convert", options, [], ["adapters"], body)


def probe(ws: Workspace) -> None:
    """Every adapter on the probe examples of its task and of those most alike -> `losses.json`."""
    c, n = ws.config, len(ws.names)
    n_others = others_needed(n, c.neighbours, None if c.planned else ws.capacity.n_clusters)

    def body() -> None:
        measured = nearest(ws.similarity, n_others)
        table = probe_table(ws.evaluator, ws.adapters, ws.probes, measured)
        write_json(ws.path("losses.json"), table.to_json())

    options = [ws.base.fingerprint, [examples.digest for examples in ws.probes], n_others]
    ws.stage("probe", options, ["adapters"], ["losses.json"], body)


def plan(ws: Workspace) -> None:
    """For a budget in bytes: what to store of which adapters and merges -> `plan.json`."""
    c = ws.config

    def body() -> None:
        write_json(ws.path("plan.json"), make_plan(ws, measure(ws), ws.capacity.room))

    options = [ws.base.fingerprint, [p.digest for p in ws.probes], _merge_options(c),
               ws.capacity.max_bytes, c.max_adapters]  # fmt: skip
    ws.stage("plan", options, ["adapters", "losses.json"], ["plan.json"], body)


def cluster(ws: Workspace) -> None:
    """Which adapters to merge: D2C and the baselines -> `clusters.json`."""
    c = ws.config
    k, n = ws.capacity.n_clusters, len(ws.names)
    if k == n > 1:
        warnings.warn(
            f"budget: {c.budget} has room for all adapters ({n}), so none has to be merged; give"
            " less for a smaller pack",
            InputWarning,
            stacklevel=2,
        )

    def body() -> None:
        found = d2c(ws.problem, k, search=c.search, init=c.init, seed=c.seed, eps=c.eps,
                    patience=c.patience)  # fmt: skip
        methods = {
            "d2c": [found],
            "kmeans": [kmeans(ws.problem.features, k, c.seed)],
            "random": [random_partition(n, k, c.seed + i) for i in range(c.random_seeds)],
            "merge-all": [merge_all(n)],
        }
        content = {
            "adapters": ws.names,
            "n_clusters": k,
            "methods": {
                name: [dataclasses.asdict(clustering) for clustering in clusterings]
                for name, clusterings in methods.items()
            },
        }
        write_json(ws.path("clusters.json"), content)

    # A merge that is clustered alike is not clustered again.
    like = c.replace(merge_method=ws.merger.quick_method)
    options = [ws.base.fingerprint, [p.digest for p in ws.probes], k, _merge_options(like),
               c.search, c.patience, c.init, c.random_seeds]  # fmt: skip
    ws.stage("cluster", options, ["adapters", "losses.json"], ["clusters.json"], body)


def merge(ws: Workspace) -> None:
    """One adapter per D2C cluster -> `merged/<k>/`, and `merges.json` with members and scales."""

    def body() -> None:
        (clustering,) = _clusterings(ws)["d2c"]
        merges = []
        with write_dir(ws.path("merged")) as directory:
            for k, members in enumerate(clustering.groups):
                merged = ws.merger.final(members)
                merged.adapter.save(directory / str(k), ws.base.n_layers)
                names = [ws.names[i] for i in members]
                merges.append({"members": names, "method": merged.method, "scale": merged.scale})
        write_json(ws.path("merges.json"), merges)

    options = [ws.base.fingerprint, _merge_options(ws.config)]
    reads = ["adapters", "losses.json", "clusters.json"]
    ws.stage("merge", options, reads, ["merged", "merges.json"], body)


def refine(ws: Workspace) -> None:
    """If asked for: each merge trained to match its members -> `refined/<k>/`, `refines.json`."""
    if not ws.config.refine:
        return

    def body() -> None:
        # A cluster takes minutes: each is kept as soon as it is done.
        kept = ws.path("refining")
        parts = [refine_cluster(ws, k, entry["members"], kept)
                 for k, entry in enumerate(ws.read("merges.json"))]  # fmt: skip
        with write_dir(ws.path("refined")) as directory:
            for k, part in enumerate(parts):
                shutil.copytree(part / "adapter", directory / str(k))
        facts = [json.loads((part / "refine.json").read_text("utf-8")) for part in parts]
        write_json(ws.path("refines.json"), facts)

    reads = ["adapters", "losses.json", "merged", "merges.json"]
    ws.stage("refine", refine_inputs(ws), reads, ["refined", "refines.json"], body)
    # Not before the stage is recorded: what is half removed would be taken for done.
    remove_dir(ws.path("refining"))


def pack(ws: Workspace) -> None:
    """Adapters and a manifest -> `pack/`, within the budget: merges in 16 bit, or as planned."""
    c = ws.config
    about: dict[str, Any] = {
        "model": ws.base.name,
        "config_hash": ws.base.config_hash,
        "n_layers": ws.base.n_layers,
        "budget": ws.capacity.budget.text,
        "max_bytes": ws.capacity.max_bytes,
        "origins": {adapter.name: adapter.origin for adapter in ws.inputs if adapter.origin},
        "ready": partial(expect_pack, ws.output),
    }
    source = "refined" if c.refine else "merged"

    def merges() -> None:
        adapters = [
            dataclasses.replace(load_adapter(ws.path(source) / str(k)), sources=tuple(members))
            for k, members in enumerate(entry["members"] for entry in ws.read("merges.json"))
        ]
        write_pack(ws.path("pack"), adapters, **about)

    def compact() -> None:
        adapters, serves = planned(ws, ws.read("plan.json"))
        write_compact_pack(ws.path("pack"), adapters, serves, dtype=ws.base.dtype, **about)

    if c.planned:
        reads, body = ["adapters", "plan.json"], compact
    else:
        reads, body = [source, "merges.json"], merges
    options = [ws.base.name, ws.base.config_hash, about["budget"], ws.capacity.total,
               about["origins"]]  # fmt: skip
    ws.stage("pack", options, reads, ["pack"], body)


def bench(ws: Workspace) -> None:
    """Every method on the held-out test examples -> `bench.json`."""
    by_d2c = not ws.config.planned

    def clusterings() -> dict[str, list[Clustering]]:
        shown = {*ws.config.baselines, "d2c"}
        found = _clusterings(ws) if by_d2c else {}
        return {name: some for name, some in found.items() if name in shown}

    def body() -> None:
        packed = load_pack(ws.path("pack"))
        served = {name: packed.load(name) for name in ws.names}
        methods = {
            "base": Method(0, [dict.fromkeys(ws.names)]),
            "individual": Method(ws.capacity.total, [dict(zip(ws.names, ws.adapters))]),
            **{name: _method(ws, found) for name, found in clusterings().items()},
            "pack": Method(packed.nbytes, [served]),
        }
        results = bench_methods(ws.evaluator, methods, ws.tests)
        # Which pack was measured: a card of another one must not show this.
        of = {"pack": {"manifest_sha256": hash_file(ws.path("pack") / MANIFEST)}}
        content = {"methods": results, "provenance": {**provenance(ws), **of}}
        n = ws.config.answers
        if n:
            shown = {name: methods[name] for name in ("base", "individual", "pack")}
            content["answers"] = {
                task.name: answer_rows(ws.base, shown, task.test[:n], examples)
                for task, examples in zip(ws.tasks, ws.tests)
            }
            content["metrics"] = answer_metrics(content["answers"], list(shown))
        write_json(ws.path("bench.json"), content)

    options = [ws.base.fingerprint, [examples.digest for examples in ws.tests],
               _merge_options(ws.config), ws.config.baselines, ws.config.answers]  # fmt: skip
    reads = ["adapters", "losses.json", *(["clusters.json"] if by_d2c else []), "pack"]
    ws.stage("bench", options, reads, ["bench.json"], body)


def report(ws: Workspace) -> None:
    """The results for people -> `report.md`, `report.html`."""
    chosen = ["plan.json"] if ws.config.planned else ["clusters.json", "merges.json"]
    reads = ["losses.json", *chosen, "pack/manifest.json", "bench.json"]
    # What `bench PACK --json` of this pack printed, where the user put it.
    phone = ws.path("phone.json")
    if phone.exists():
        reads.append(phone.name)

    def body() -> None:
        artifacts = {Path(name).stem: ws.read(name) for name in reads}
        if phone.exists():
            artifacts["phone"] = read_phone(phone, of=ws.path("pack"))
        for name, render in (("report.md", render_markdown), ("report.html", render_html)):
            write_text(ws.path(name), render(artifacts))

    ws.stage("report", None, reads, ["report.md", "report.html"], body)


STAGES: dict[str, Callable[[Workspace], None]] = {
    stage.__name__: stage
    for stage in (convert, probe, plan, cluster, merge, refine, pack, bench, report)
}


# Stages that are left out, by whether the pack is planned.
_WITHOUT = {False: ("plan",), True: ("cluster", "merge", "refine")}


def _merge_options(config: RunConfig) -> list[object]:
    c = config
    return [c.merge_method, c.density, c.scale, c.merge_rank, c.eps, c.seed]


def _clusterings(ws: Workspace) -> dict[str, list[Clustering]]:
    """Method -> clusterings, from `clusters.json`, best-known baselines first."""
    methods: dict[str, list[dict[str, Any]]] = ws.read("clusters.json")["methods"]
    return {
        name: [Clustering(**{**entry, "labels": tuple(entry["labels"])}) for entry in methods[name]]
        for name in ("merge-all", "random", "kmeans", "d2c")
    }


def _method(ws: Workspace, clusterings: Sequence[Clustering]) -> Method:
    """What serves each task when these clusterings are merged as the pack's is."""
    variants, nbytes = [], []
    for clustering in clusterings:
        merged = [ws.merger.final(members).adapter for members in clustering.groups]
        variants.append({ws.names[i]: merged[k] for i, k in enumerate(clustering.labels)})
        nbytes.append(sum(adapter.nbytes(ws.base.n_layers) for adapter in merged))
    return Method(round(sum(nbytes) / len(nbytes)), variants)
