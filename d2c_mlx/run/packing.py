"""The stages refine and pack: what was merged or planned is trained, and becomes a pack."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.compact_file import read_compact, write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.plan import OnDemand, serves_of
from d2c_mlx.merge.library import Library
from d2c_mlx.models.tasks import systems_of
from d2c_mlx.packs.manifest import COMPACT, GgufPlaces, Manifest
from d2c_mlx.packs.overwrite import mark
from d2c_mlx.packs.write import write_compact_pack, write_gguf_pack, write_pack
from d2c_mlx.refine.refine import Member, TrainOptions, refine
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.inputs import Inputs, stored
from d2c_mlx.run.run import Run
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import warn
from d2c_mlx.utils.files import fingerprint, hash_file, hash_tree, write_dir, write_json


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
        write_pack(path, named, about, ready)
        return
    forms, serves = stored_forms(run, source), serves_of(run.read("plan.json"))
    if run.config.format == "gguf":
        places = GgufPlaces.of(run.inputs.library.base.config, list(run.capacity.shapes))
        files = [run.path(source) / f"{k}.gguf" for k in range(len(forms))]
        write_gguf_pack(path, files, serves, about.model_copy(update={"gguf": places}), ready)
    else:
        write_compact_pack(path, forms, serves, about, ready)


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
