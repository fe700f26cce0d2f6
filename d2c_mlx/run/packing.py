"""The pack stage of a run: what was merged or planned becomes a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.planner import serves_of
from d2c_mlx.models.tasks import systems_of
from d2c_mlx.packs.manifest import COMPACT, GgufPlaces, Manifest
from d2c_mlx.packs.write import write_compact_pack, write_gguf_pack, write_pack
from d2c_mlx.run.inputs import Inputs, stored
from d2c_mlx.run.run import Run
from d2c_mlx.utils.sequences import OnDemand

__all__ = ["manifest_of", "pack_merges", "pack_plan", "stored_forms"]

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
