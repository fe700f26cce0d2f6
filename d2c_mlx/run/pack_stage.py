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
from d2c_mlx.run.inputs import Inputs
from d2c_mlx.run.session import Session
from d2c_mlx.utils.sequences import OnDemand

__all__ = ["pack_info", "pack_merges", "pack_plan", "stored_forms"]

Ready = Callable[[Path], None]


def pack_info(inputs: Inputs) -> Manifest:
    """What the manifest says of the base model, the budget and the task adapters."""
    base = inputs.base
    return Manifest(
        model=base.name,
        config_hash=base.config_hash,
        weights_hash=base.weights_hash,
        n_layers=base.n_layers,
        budget=inputs.capacity.budget.text,
        max_bytes=inputs.capacity.max_bytes,
        origins={adapter.name: adapter.origin for adapter in inputs.adapters if adapter.origin},
        systems=systems_of(inputs.tasks),
        dtype=base.dtype,
    )


def pack_merges(session: Session, source: str, info: Manifest, ready: Ready) -> None:
    """Write the adapters of `source/` in 16 bit -> `pack/`; `ready` is called before it is seen."""
    adapters = [
        dataclasses.replace(session.stored_adapter(f"{source}/{k}"), sources=tuple(names))
        for k, names in enumerate(entry["members"] for entry in session.read("merges.json"))
    ]
    write_pack(session.path("pack"), adapters, info, ready)


def pack_plan(session: Session, source: str, info: Manifest, ready: Ready) -> None:
    """Write the plan's adapters of `source/`, as stored; `ready` is called before they are seen."""
    inputs, plan = session.inputs, session.read("plan.json")
    if session.config.format == "gguf":
        files = [session.path(source) / f"{k}.gguf" for k in range(len(plan["units"]))]
        places = GgufPlaces.of(inputs.base.config, inputs.capacity.target_paths)
        info = info.model_copy(update={"gguf": places})
        write_gguf_pack(session.path("pack"), files, serves_of(plan), info, ready)
        return
    adapters = stored_forms(session, source)
    write_compact_pack(session.path("pack"), adapters, serves_of(plan), info, ready)


def stored_forms(session: Session, source: str) -> Sequence[Compressed]:
    """The adapters of a plan in `source/`, as they are stored, each read when asked for."""
    file = session.path(source) / COMPACT
    return OnDemand(partial(read_compact, file), len(session.read("plan.json")["units"]))
