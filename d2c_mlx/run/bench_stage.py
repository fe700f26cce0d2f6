"""The bench stage of a run: the pack beside what it could have been, on rows or by weights."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.similarity import errors_and_kept
from d2c_mlx.adapters.tensor_file import Spool
from d2c_mlx.cluster.partition import Clusters
from d2c_mlx.compress.planner import serves_of
from d2c_mlx.evaluate.answers import answer_rows
from d2c_mlx.evaluate.heldout import BenchMethod, bench_methods, excess_interval
from d2c_mlx.evaluate.metrics import answer_metrics
from d2c_mlx.merge.merging import merge
from d2c_mlx.packs.export import unpacked_nbytes
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.run.config import ANSWERED_ROWS
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.run.pack_stage import stored_forms
from d2c_mlx.run.session import Session
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import hash_file

__all__ = ["clusterings", "compare_losses", "compare_weights"]


def compare_losses(session: Session) -> dict[str, Any]:
    """Content of `bench.json`: base, task adapters, baselines and pack on the held-out rows."""
    inputs = session.inputs
    packed = load_pack(session.path("pack"))
    methods = {
        "base": BenchMethod(0, [dict.fromkeys(inputs.names)]),
        "individual": BenchMethod(
            inputs.capacity.total, [dict(zip(inputs.names, session.adapters))]
        ),
        **(_planned(session, packed) if session.planned else _merged_methods(session)),
        "pack": BenchMethod(packed.nbytes, [_unpacked(packed)]),
    }
    results = bench_methods(session.scorer, methods, inputs.tests)
    content = {"methods": results, **_about(session, packed)}
    served, own = (methods[name].variants[0] for name in ("pack", "individual"))
    content["interval"] = excess_interval(inputs.engine, served, own, inputs.tests)
    shown = {name: methods[name] for name in ("base", "individual", "pack")}
    asked = [(task.test[: min(ANSWERED_ROWS, len(rows.examples))], rows)
             for task, rows in zip(inputs.tasks, inputs.tests)]  # fmt: skip
    content["answers"] = answer_rows(inputs.base, shown, asked, session.scorer.progress)
    content["metrics"] = answer_metrics(content["answers"], list(shown))
    return content


def compare_weights(session: Session) -> dict[str, Any]:
    """Content of `weights.json`, what can be said of the pack without rows."""
    packed, tasks = load_pack(session.path("pack")), {}
    for adapter in session.adapters:
        error, kept = errors_and_kept(adapter, packed.load(adapter.name))
        tasks[adapter.name] = {"error": error**0.5, "kept": kept}
    mean = {key: sum(one[key] for one in tasks.values()) / len(tasks) for key in ("error", "kept")}
    methods = {"individual": {"nbytes": session.inputs.capacity.total},
               "pack": {"nbytes": packed.nbytes, **mean, "tasks": tasks}}  # fmt: skip
    cosines = session.library.similarity.round(4).tolist()
    return {"methods": methods, "similarity": cosines, **_about(session, packed)}


def clusterings(session: Session) -> dict[str, list[Clusters]]:
    """Method -> its clusterings, from `clusters.json`, baselines first."""
    methods: dict[str, list[dict[str, Any]]] = session.read("clusters.json")["methods"]
    return {
        name: [Clusters.from_json(entry) for entry in methods[name]]
        for name in ("merge-all", "random", "kmeans", "d2c")
    }


def _about(session: Session, packed: Pack) -> dict[str, Any]:
    """How the pack was made and its bytes in memory, as a bench says beside its methods."""
    # Names the measured pack, since the card of another one must not show these numbers.
    of = {"pack": {"manifest_sha256": hash_file(session.path("pack") / MANIFEST)}}
    about = {**_provenance(session.inputs), **of, "unused": session.unused}
    return {"provenance": about, "unpacked_nbytes": unpacked_nbytes(packed)}


def _unpacked(pack: Pack) -> dict[str, Adapter | None]:
    """Task -> the adapter that serves it, in a temporary file; None is the base model."""
    spool, found = Spool(), dict.fromkeys(pack.tasks)
    for tasks in pack.adapters.values():
        if adapter := pack.load(tasks[0]):
            found |= dict.fromkeys(tasks, spool.put(adapter))
    return found


def _planned(session: Session, pack: Pack) -> dict[str, BenchMethod]:
    """The plan before it was refined, for a pack that is."""
    if not session.config.refine:
        return {}
    forms, plan = stored_forms(session, "planned"), session.read("plan.json")
    spool, plain = Spool(), dict[int | None, Adapter | None]()
    for k, form in enumerate(forms):
        if adapter := form.adapter(session.inputs.base.dtype):
            plain[k] = spool.put(adapter)
    serves = {name: plain.get(k) for name, k in serves_of(plan).items()}
    return {"plan": BenchMethod(pack.nbytes, [serves])}


def _merged_methods(session: Session) -> dict[str, BenchMethod]:
    """The merges of D2C, read from `merged/`, and of the baselines, merged here in the same way."""
    names, n_layers = session.inputs.names, session.inputs.base.n_layers
    found = {}
    for method, some in clusterings(session).items():
        if method not in {*session.baselines, "d2c"}:
            continue
        variants, nbytes = [], []
        for clustering in some:
            if method == "d2c":
                merged = [session.stored_adapter(f"merged/{k}")
                          for k in range(clustering.n_clusters)]  # fmt: skip
            else:
                merged = [
                    merge(session.library, one, session.config.merging).adapter
                    for one in clustering.groups
                ]
            variants.append({names[i]: merged[k] for i, k in enumerate(clustering.labels)})
            nbytes.append(sum(adapter.nbytes(n_layers) for adapter in merged))
        found[method] = BenchMethod(round(sum(nbytes) / len(nbytes)), variants)
    return found


def _provenance(inputs: Inputs) -> dict[str, Any]:
    """Options, versions, machine, and hashes of the inputs of a run, as a JSON value."""
    base, capacity = inputs.base, inputs.capacity
    n_answers = sum(len(one.examples) for one in inputs.answers.values())
    return {
        "config": inputs.config.to_dict(),
        "base": {"model": base.name, "config_sha256": base.config_hash},
        "compute_dtype": str(base.compute_dtype).split(".")[-1],
        **({"n_answers": n_answers} if n_answers else {}),
        **({"plugins": found} if (found := list(map(str, inputs.config.plugins))) else {}),
        "budget": {
            "text": capacity.budget.text,
            "nbytes": capacity.max_bytes,
            "input_nbytes": capacity.total,
        },
        "inputs": {
            adapter.name: {
                "adapter": adapter.digest,
                **({"probe": rows[0].digest, "test": rows[1].digest} if rows else {}),
                **({"answers": more.digest} if (more := inputs.answers.get(adapter.name)) else {}),
                **({"origin": adapter.origin} if adapter.origin else {}),
                **({} if adapter.dora_error is None else {"dora_error": adapter.dora_error}),
            }
            for adapter, rows in zip_longest(inputs.adapters, zip(inputs.probes, inputs.tests))
        },
        **environment(),
    }
