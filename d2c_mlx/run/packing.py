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

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.compact_file import read_compact, write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.plan import serves_of
from d2c_mlx.merge.library import Library
from d2c_mlx.models.tasks import systems_of
from d2c_mlx.packs.manifest import COMPACT, GgufPlaces, Manifest
from d2c_mlx.packs.overwrite import mark
from d2c_mlx.packs.write import write_compact_pack, write_gguf_pack, write_pack
from d2c_mlx.refine.refine import Member, RefineOptions, refine
from d2c_mlx.refine.students import Form
from d2c_mlx.run.config import RunConfig
from d2c_mlx.run.inputs import Inputs, stored
from d2c_mlx.run.run import Run
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import warn
from d2c_mlx.utils.files import fingerprint, hash_file, write_dir, write_json
from d2c_mlx.utils.sequences import OnDemand

__all__ = ["manifest_of", "members_of", "pack_merges", "pack_plan", "refine_key", "refine_merges",
           "refine_plan", "stored_forms"]  # fmt: skip

Ready = Callable[[Path], None]


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


def pack_merges(run: Run, source: str, about: Manifest, ready: Ready) -> None:
    """Write the adapters of `source/` in 16 bit -> `pack/`; `ready` is called before it is seen."""
    adapters = [
        dataclasses.replace(stored(run.path(f"{source}/{k}")), sources=tuple(entry["members"]))
        for k, entry in enumerate(run.read("merges.json"))
    ]
    write_pack(run.path("pack"), adapters, about, ready)


def pack_plan(run: Run, source: str, about: Manifest, ready: Ready) -> None:
    """Write the plan's adapters of `source/`, as stored; `ready` is called before they are seen."""
    plan = run.read("plan.json")
    if run.config.format == "gguf":
        files = [run.path(source) / f"{k}.gguf" for k in range(len(plan["units"]))]
        places = GgufPlaces.of(run.inputs.library.base.config, run.capacity.target_paths)
        about = about.model_copy(update={"gguf": places})
        write_gguf_pack(run.path("pack"), files, serves_of(plan), about, ready)
        return
    adapters = stored_forms(run, source)
    write_compact_pack(run.path("pack"), adapters, serves_of(plan), about, ready)


def stored_forms(run: Run, source: str) -> Sequence[Compressed]:
    """The adapters of a plan in `source/`, as they are stored, each read when asked for."""
    file = run.path(source) / COMPACT
    return OnDemand(partial(read_compact, file), len(run.read("plan.json")["units"]))


def refine_key(config: RunConfig, library: Library) -> list[object]:
    """Everything that refining depends on besides adapters and what is refined, as a JSON value."""
    extra = [[task.name, task.extra.digest] for task in library.tasks if task.extra]
    return [VERSION, library.base.fingerprint, dataclasses.asdict(RefineOptions(seed=config.seed)),
            [[task.name, task.calibration.digest] for task in library.tasks], extra]  # fmt: skip


def members_of(library: Library, names: Sequence[str]) -> list[Member]:
    """Tasks as `refine` takes them: adapter, calibration rows, answers to prompts, gain."""
    assert library.losses, "refining needs rows"
    members = []
    for i in map(library.names.index, names):
        task, gain = library.tasks[i], float(library.losses.gain[i])
        members.append(Member(library.adapters[i], task.calibration, gain, task.extra))
    return members


def refine_merges(run: Run, library: Library) -> None:
    """Refine every merge -> `refined/<k>/`, `refines.json`."""

    def save(directory: Path, adapter: Adapter) -> None:
        adapter.save(directory / "adapter", library.base.n_layers)

    parts = []
    for k, entry in enumerate(run.read("merges.json")):
        merged = read_adapter(run.path("merged") / str(k))
        parts.append(_refined(run, library, entry["members"], merged.digest, merged, save))
    with write_dir(run.path("refined")) as directory:
        for k, part in enumerate(parts):
            shutil.copytree(part / "adapter", directory / str(k))
        mark(directory, "run")
    _remember(run, parts)


def refine_plan(run: Run, library: Library) -> None:
    """Refine every adapter of a plan, as it is stored -> `refined/`, `refines.json`."""

    def save(directory: Path, form: Compressed) -> None:
        write_compact(directory / COMPACT, [form])

    parts, planned = [], hash_file(run.path("planned") / COMPACT)
    units, forms = run.read("plan.json")["units"], stored_forms(run, "planned")
    for k, (unit, form) in enumerate(zip(units, forms)):
        parts.append(_refined(run, library, unit["tasks"], [planned, k], form, save))
    refined = OnDemand(lambda k: read_compact(parts[k] / COMPACT, 0), len(parts))
    with write_dir(run.path("refined")) as directory:
        run.capacity.storage.write(directory, refined)
        mark(directory, "run")
    _remember(run, parts)


def _refined(
    run: Run,
    library: Library,
    names: Sequence[str],
    source: object,
    adapter: Form,
    save: Callable[[Path, Form], None],
) -> Path:
    """Refine one adapter, unless that is done already: it takes minutes.

    Args:
        run: the run.
        library: its measured library.
        names: tasks that it serves.
        source: a JSON value that tells the adapter from others.
        adapter: a merge, or an adapter as it is stored.
        save: writes the result into a directory.

    Returns:
        A directory in `refining/`, named by a hash of all that it depends on, with what `save`
        wrote and `refine.json`: members, whether it was refined, divergence before and after
        (null if training overflowed), seconds.
    """
    members = members_of(library, names)
    contents = [[member.adapter.digest, member.gain] for member in members]
    key = fingerprint([refine_key(run.config, library), list(names), contents, source])
    part = run.path("refining") / key[:32]
    if part.exists():
        return part
    started, options = time.monotonic(), RefineOptions(seed=run.config.seed)
    refined = refine(library.base, adapter, members, options, library.scorer.progress)
    finite = math.isfinite(refined.after)
    if not finite:
        warn(f"refine: {', '.join(names)}: training ended in numbers that are not finite, so the"
             " adapter is left as it was")  # fmt: skip
    facts = {
        "members": list(names),
        "refined": refined.adapter is not adapter,
        "divergence": {"before": refined.before, "after": refined.after if finite else None},
        "seconds": round(time.monotonic() - started, 2),
    }
    with write_dir(part) as directory:
        save(directory, refined.adapter)
        write_json(directory / "refine.json", facts)
        mark(directory, "run")
    return part


def _remember(run: Run, parts: Sequence[Path]) -> None:
    facts = [json.loads((part / "refine.json").read_text("utf-8")) for part in parts]
    write_json(run.path("refines.json"), facts)
