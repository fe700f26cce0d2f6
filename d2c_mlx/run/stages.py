"""The work of refine, pack and bench: what was chosen is trained, written and measured."""

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import errors_and_kept
from d2c_mlx.adapters.tensor_file import Spool
from d2c_mlx.cluster.partition import Clusters, Members, canonical
from d2c_mlx.cluster.search import STRENGTHS
from d2c_mlx.compress.compact_file import COMPACT, read_compact, write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.plan import OnDemand, serves_of, smallest_plan
from d2c_mlx.evaluate.heldout import (
    BenchMethod,
    answer_rows,
    bench_methods,
    paired_bootstrap,
    row_losses,
)
from d2c_mlx.evaluate.scorer import LossTable
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import merge
from d2c_mlx.models.rows import is_prompt
from d2c_mlx.models.tasks import systems_of
from d2c_mlx.packs.export import unpacked_nbytes
from d2c_mlx.packs.manifest import MANIFEST, GgufPlaces, Manifest
from d2c_mlx.packs.overwrite import mark
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.packs.write import write_pack
from d2c_mlx.refine.refine import Member, TrainOptions, refine
from d2c_mlx.report.report import answered, questions, render_table, verdict
from d2c_mlx.run.config import ANSWERED_ROWS, RANDOM_PARTITIONS, RunConfig
from d2c_mlx.run.inputs import Inputs, stored
from d2c_mlx.run.run import Run
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import warn
from d2c_mlx.utils.files import fingerprint, hash_file, hash_tree, read_text, write_dir, write_json
from d2c_mlx.utils.parsing import parse_json

# Held-out rows of each task that bench begins with. It doubles them until the 95 % interval of the
# excess is as narrow as this, in nats, or none is left.
_FIRST_ROWS, _NARROW = 25, 0.02
# Exceptions of readers of JSON for other types, keys or numbers than they look for.
MISREAD = (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError)


def manifest_of(inputs: Inputs) -> Manifest:
    """What the manifest says of the base model, the budget and the task adapters."""
    base, library = inputs.library.base, inputs.library
    return Manifest(
        model=base.name,
        config_hash=base.config_hash,
        weights_hash=base.weights_hash,
        n_layers=base.n_layers,
        budget=inputs.capacity.budget.text,
        max_bytes=inputs.capacity.max_bytes,
        origins={adapter.name: adapter.origin for adapter in library.adapters if adapter.origin},
        systems=systems_of(task.rows for task in library.tasks),
        dtype=base.dtype,
    )


def pack_all(run: Run, source: str, about: Manifest, ready: Callable[[Path], None]) -> None:
    """Write the adapters of `source/` -> `pack/`: merges in 16 bit, those of a plan as stored.

    Args:
        run: the run.
        source: `merged`, `planned` or `refined`.
        about: what the manifest says.
        ready: called with the complete pack before it is in place.
    """
    path = run.path("pack")
    if not run.planned:
        members = [tuple(entry["members"]) for entry in run.read("merges.json")]
        merges = [stored(run.path(f"{source}/{k}")) for k in range(len(members))]
        named = [dataclasses.replace(x, sources=names) for x, names in zip(merges, members)]
        write_pack(path, named, about, ready=ready)
        return
    forms, serves = stored_forms(run, source), serves_of(run.read("plan.json"))
    if run.config.format == "gguf":
        places = GgufPlaces.of(run.inputs.library.base.config, list(run.capacity.shapes))
        files = [run.path(source) / f"{k}.gguf" for k in range(len(forms))]
        write_pack(path, files, about.model_copy(update={"gguf": places}), serves, ready)
    else:
        write_pack(path, forms, about, serves, ready)


def stored_forms(run: Run, source: str) -> Sequence[Compressed]:
    """The adapters of a plan in `source/`, as they are stored, each read when asked for."""
    file = run.path(source) / COMPACT
    return OnDemand(partial(read_compact, file), len(run.read("plan.json")["units"]))


def refine_key(config: RunConfig, library: Library) -> list[object]:
    """Everything that refining depends on besides adapters and what is refined, as a JSON value."""
    rows = [[task.name, task.calibration.digest] for task in library.tasks]
    extra = [[task.name, task.extra.digest] for task in library.tasks if task.extra]
    options = dataclasses.asdict(TrainOptions(seed=config.seed))
    return [VERSION, library.base.fingerprint, options, rows, extra]


def members_of(library: Library, names: Sequence[str]) -> list[Member]:
    """Tasks as `refine` takes them: adapter, calibration rows, answers to prompts, gain."""
    assert library.losses, "refining needs rows"
    members = []
    for i in map(library.names.index, names):
        task, gain = library.tasks[i], float(library.losses.gain[i])
        members.append(Member(library.adapters[i], task.calibration, gain, task.extra))
    return members


def refine_all(run: Run, library: Library) -> None:
    """Train every merge, or stored form of a plan -> `refined/`, `refines.json`.

    Each takes minutes, so it is kept in `refining/` once it is done, in a directory named by a hash
    of all that it depends on. `refines.json` has members, whether they were refined, divergence
    before and after (null if training overflowed) and seconds.
    """
    forms: Sequence[Any]
    if run.planned:
        members = [unit["tasks"] for unit in run.read("plan.json")["units"]]
        forms, source = stored_forms(run, "planned"), hash_file(run.path("planned") / COMPACT)
    else:
        members = [entry["members"] for entry in run.read("merges.json")]
        forms = [stored(run.path(f"merged/{k}")) for k in range(len(members))]
        source = hash_tree(run.path("merged"))
    options = TrainOptions(seed=run.config.seed)
    key, parts = refine_key(run.config, library), []
    for k, (names, form) in enumerate(zip(members, forms)):
        part = run.path("refining") / fingerprint([key, names, source, k])[:32]
        parts.append(part)
        if part.exists():
            continue
        started, tasks = time.monotonic(), members_of(library, names)
        refined = refine(library.base, form, tasks, options, library.scorer.progress)
        after = refined.after if math.isfinite(refined.after) else None
        if after is None:
            warn(
                f"refine: {', '.join(names)}: training ended in numbers that are not finite, so the"
                " adapter is left as it was"
            )
        facts = {
            "members": list(names),
            "refined": refined.adapter is not form,
            "divergence": {"before": refined.before, "after": after},
            "seconds": round(time.monotonic() - started, 2),
        }
        with write_dir(part) as directory:
            if isinstance(refined.adapter, Adapter):
                refined.adapter.save(directory / "adapter", library.base.n_layers)
            else:
                write_compact(directory / COMPACT, [refined.adapter])
            write_json(directory / "refine.json", facts)
            mark(directory, "run")
    with write_dir(run.path("refined")) as directory:
        if run.planned:
            kept = OnDemand(lambda k: read_compact(parts[k] / COMPACT, 0), len(parts))
            run.capacity.storage.write(directory, kept)
        else:
            for k, part in enumerate(parts):
                shutil.copytree(part / "adapter", directory / str(k))
        mark(directory, "run")
    everything = [json.loads((part / "refine.json").read_text("utf-8")) for part in parts]
    write_json(run.path("refines.json"), everything)


def compare_losses(run: Run, library: Library) -> dict[str, Any]:
    """Content of `bench.json`: base, task adapters, baselines and pack on the held-out rows."""
    packed, names, dtype = load_pack(run.path("pack")), library.names, library.base.dtype
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
    methods = shown | ({} if run.planned else _merged_methods(run, library, spool))
    if run.planned and run.config.refine:  # The plan before it was refined.
        forms = (form.adapter(dtype) for form in stored_forms(run, "planned"))
        plain = {k: adapter and spool.put(adapter) for k, adapter in enumerate(forms)}
        serves = serves_of(run.read("plan.json")).items()
        before = {name: None if k is None else plain[k] for name, k in serves}
        methods["plan"] = BenchMethod(packed.nbytes, [before])
    methods["pack"] = methods.pop("pack")  # the last row
    scorer, most = library.scorer, max(len(task.held_out.examples) for task in library.tasks)
    n_rows, cuts, narrow = 0, [_FIRST_ROWS // 2], False
    while n_rows < most and not narrow:
        n_rows = 2 * n_rows or _FIRST_ROWS
        held_out = [rows.first(n_rows, cuts) for rows in library.held_out]
        ours, theirs = (row_losses(scorer, each, held_out) for each in (served, own))
        interval = paired_bootstrap(ours, theirs)
        low, high = interval["low"], interval["high"]  # None of one row alone
        narrow = low is not None and high is not None and high - low < _NARROW
        cuts.append(n_rows)  # so that these rows are not evaluated again
    compared = bench_methods(scorer, methods, held_out)
    rivals = {}
    for name in (name for name in methods if name in run.baselines):
        losses = [row_losses(scorer, variant, held_out) for variant in methods[name].variants]
        mean = {task: np.mean([each[task] for each in losses], axis=0) for task in ours}
        rivals[name] = paired_bootstrap(ours, mean)
    n = [min(ANSWERED_ROWS, len(task.held_out.examples)) for task in library.tasks]
    asked = [(task.rows.test[:k], task.held_out) for task, k in zip(library.tasks, n)]
    answers = answer_rows(library.base, shown, asked, scorer.progress)
    return {
        "methods": compared,
        **_about(run, library, packed),
        "n_held_out": sum(len(task.held_out.examples) for task in library.tasks),
        "interval": {"low": low, "high": high},
        # The pack's loss less a rival's, on the same rows.
        "rivals": rivals,
        "plan": None if run.planned else smallest_plan(library, run.capacity, compared["pack"]),
        # The NLL of every held-out row and its number of targets, to compare packs row by row.
        "rows": {task: losses.tolist() for task, losses in ours.items()},
        "answers": answers,
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


def is_sound(path: Path, names: Sequence[str]) -> bool:
    """True unless an artifact is JSON that no stage can have written for adapters of these names.

    A stranger may have sent it with a true record. Its readers are tried on it, all but the report,
    so that its shape is described once.
    """
    try:
        content: Any = parse_json(read_text(path)) if path.suffix == ".json" else None
        match path.name:
            case "losses.json":
                table = LossTable.from_json(content)
                losses = np.stack([table.individual, table.base, *table.weakened.T])
                # Squares of losses must be finite.
                sound = table.strengths == STRENGTHS and bool((np.abs(losses) < 1e100).all())
                tasks: Sequence[str] = table.tasks if sound else ()
            case "clusters.json":
                methods = [*clusterings(content).values()]
                labels = [entry.labels for each in methods for entry in each]
                sound = all(x == canonical(x) and len(x) == len(names) for x in labels)
                sound = sound and [*map(len, methods)] == [1, RANDOM_PARTITIONS, 1, 1]
                tasks = content["adapters"] if sound else ()
            case "merges.json":
                tasks = [name for entry in content for name in entry["members"]]
            case "plan.json":
                tasks = [*serves_of(content)]
            case "bench.json" | "weights.json":
                for read in (render_table, verdict, answered, questions):
                    read(content)
                tasks = [*content["methods"]["pack"]["tasks"]]
            case _:
                return True
        return sorted(tasks) == sorted(names)
    except MISREAD:
        return False


def clusterings(content: Mapping[str, Any]) -> dict[str, list[Clusters]]:
    """Method -> its clusterings, from the content of `clusters.json`, baselines first."""
    return {
        name: [Clusters(**x | {"labels": tuple(x["labels"])}) for x in content["methods"][name]]
        for name in ("merge-all", "random", "kmeans", "d2c")
    }


def _merged_methods(run: Run, library: Library, spool: Spool) -> dict[str, BenchMethod]:
    """The merges of D2C, read from `merged/`, and of the baselines, merged here in the same way."""
    n_layers, partitions = library.base.n_layers, clusterings(run.read("clusters.json"))
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
