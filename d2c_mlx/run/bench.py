"""The bench stage of a run: the pack beside what it could have been, on rows or by weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import errors_and_kept
from d2c_mlx.adapters.tensor_file import Spool
from d2c_mlx.cluster.partition import Clusters, Members
from d2c_mlx.compress.plan import serves_of
from d2c_mlx.evaluate.heldout import (
    BenchMethod,
    answer_metrics,
    answer_rows,
    bench_methods,
    paired_bootstrap,
    row_losses,
)
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import merge
from d2c_mlx.models.rows import is_prompt
from d2c_mlx.packs.export import unpacked_nbytes
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.run.config import ANSWERED_ROWS
from d2c_mlx.run.inputs import stored
from d2c_mlx.run.packing import stored_forms
from d2c_mlx.run.run import Run
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.files import hash_file


def compare_losses(run: Run, library: Library) -> dict[str, Any]:
    """Content of `bench.json`: base, task adapters, baselines and pack on the held-out rows."""
    packed, names = load_pack(run.path("pack")), library.names
    spool, served = Spool(), dict[str, Adapter | None].fromkeys(packed.tasks)
    for tasks in packed.adapters.values():
        if adapter := packed.load(tasks[0]):
            served |= dict.fromkeys(tasks, spool.put(adapter))
    own: Mapping[str, Adapter | None] = dict(zip(names, library.adapters))
    shown = {
        "base": BenchMethod(0, [dict.fromkeys(names)]),
        "individual": BenchMethod(run.capacity.total, [own]),
        "pack": BenchMethod(packed.nbytes, [served]),
    }
    others = {} if run.planned else _merged_methods(run, library, spool)
    if run.planned and run.config.refine:  # The plan before it was refined.
        plain = dict[int | None, Adapter]()
        for k, form in enumerate(stored_forms(run, "planned")):
            if adapter := form.adapter(library.base.dtype):
                plain[k] = spool.put(adapter)
        serves = {name: plain.get(k) for name, k in serves_of(run.read("plan.json")).items()}
        others["plan"] = BenchMethod(packed.nbytes, [serves])
    scorer, held_out = library.scorer, library.held_out
    methods = {**shown, **others}
    methods["pack"] = methods.pop("pack")  # the last row
    compared = bench_methods(scorer, methods, held_out)
    ours, theirs = (row_losses(scorer, serves, held_out) for serves in (served, own))
    interval = paired_bootstrap(ours, theirs)
    asked = [
        (task.rows.test[: min(ANSWERED_ROWS, len(task.held_out.examples))], task.held_out)
        for task in library.tasks
    ]
    answers = answer_rows(library.base, shown, asked, scorer.progress)
    return {
        "methods": compared,
        **_about(run, library, packed),
        "interval": {"low": interval["low"], "high": interval["high"]},
        # The NLL of every held-out row and its number of targets, to compare packs row by row.
        "rows": {task: losses.tolist() for task, losses in ours.items()},
        "answers": answers,
        "metrics": answer_metrics(answers, list(shown)),
    }


def compare_weights(run: Run, library: Library) -> dict[str, Any]:
    """Content of `weights.json`, what can be said of the pack without rows."""
    packed, tasks = load_pack(run.path("pack")), {}
    for adapter in library.adapters:
        error, kept = errors_and_kept(adapter, packed.load(adapter.name))
        tasks[adapter.name] = {"error": error**0.5, "kept": kept}
    mean = {x: sum(task[x] for task in tasks.values()) / len(tasks) for x in ("error", "kept")}
    methods = {
        "individual": {"nbytes": run.capacity.total},
        "pack": {"nbytes": packed.nbytes, **mean, "tasks": tasks},
    }
    cosines = library.similarity.round(4).tolist()
    return {"methods": methods, "similarity": cosines, **_about(run, library, packed)}


def clusterings(run: Run) -> dict[str, list[Clusters]]:
    """Method -> its clusterings, from `clusters.json`, baselines first."""
    methods: dict[str, list[dict[str, Any]]] = run.read("clusters.json")["methods"]
    return {
        name: [Clusters(**entry | {"labels": tuple(entry["labels"])}) for entry in methods[name]]
        for name in ("merge-all", "random", "kmeans", "d2c")
    }


def _merged_methods(run: Run, library: Library, spool: Spool) -> dict[str, BenchMethod]:
    """The merges of D2C, read from `merged/`, and of the baselines, merged here in the same way."""
    n_layers, partitions = library.base.n_layers, clusterings(run)
    (own,) = partitions["d2c"]
    # What several partitions have in common is merged once.
    merges: dict[Members, Adapter] = {
        members: stored(run.path(f"merged/{k}")) for k, members in enumerate(own.groups)
    }
    methods = {}
    for method in (name for name in partitions if name in {*run.baselines, "d2c"}):
        variants, nbytes = [], 0
        for clustering in partitions[method]:
            for members in clustering.groups:
                if members not in merges:
                    merged = merge(library, members, run.config.merging)
                    merges[members] = spool.put(merged.adapter)
            adapters = [merges[members] for members in clustering.groups]
            variants.append(
                {name: adapters[k] for name, k in zip(library.names, clustering.labels)}
            )
            nbytes += sum(adapter.nbytes(n_layers) for adapter in adapters)
        methods[method] = BenchMethod(round(nbytes / len(variants)), variants)
    return methods


def _about(run: Run, library: Library, packed: Pack) -> dict[str, Any]:
    """How the pack was made and its bytes in memory: options, versions, machine, inputs."""
    base, capacity, prompts = library.base, run.capacity, run.inputs.prompts
    sources: dict[str, dict[str, Any]] = {}
    for adapter in run.inputs.library.adapters:
        about = {"origin": adapter.origin, "dora_error": adapter.dora_error}
        there = {key: value for key, value in about.items() if value is not None}
        sources[adapter.name] = {"adapter": adapter.digest, **there}
    for task in library.tasks:
        sources[task.name] |= {"probe": task.calibration.digest, "test": task.held_out.digest}
        sources[task.name] |= {"answers": task.extra.digest} if task.extra else {}
    # Rows that an adapter answered: beside the calibration rows, and as those.
    optional = {
        "n_answers": sum(len(task.extra.examples) for task in library.tasks if task.extra),
        "answered": sorted(name for name, rows in prompts.items() if is_prompt(rows.probe[0])),
        "plugins": [str(plugin) for plugin in run.config.plugins],
    }
    provenance = {
        "config": run.config.to_dict(),
        "base": {"model": base.name, "config_sha256": base.config_hash},
        "compute_dtype": str(base.compute_dtype).split(".")[-1],
        **{key: value for key, value in optional.items() if value},
        "budget": {
            "text": capacity.budget.text,
            "nbytes": capacity.max_bytes,
            "input_nbytes": capacity.total,
        },
        "inputs": sources,
        **environment(),
        # Names the measured pack, since the card of another one must not show these numbers.
        "pack": {"manifest_sha256": hash_file(run.path("pack") / MANIFEST)},
    }
    return {"provenance": provenance, "unpacked_nbytes": unpacked_nbytes(packed)}
