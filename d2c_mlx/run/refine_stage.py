"""The refine stage of a run: trains each merge or stored form, and keeps each once it is done."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.compact_file import read_compact, write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.evaluate.loss_table import LossTable
from d2c_mlx.packs.manifest import COMPACT
from d2c_mlx.packs.overwrite import mark
from d2c_mlx.refine.refine import Member, RefineOptions, refine
from d2c_mlx.refine.students import Form
from d2c_mlx.run.pack_stage import stored_forms
from d2c_mlx.run.session import Session
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import warn
from d2c_mlx.utils.files import fingerprint, hash_file, write_dir, write_json
from d2c_mlx.utils.sequences import OnDemand

__all__ = ["members_of", "refine_inputs", "refine_merges", "refine_plan"]


def refine_inputs(session: Session) -> list[object]:
    """Everything that refining depends on besides adapters and what is refined, as a JSON value."""
    inputs = session.inputs
    return [VERSION, inputs.base.fingerprint, dataclasses.asdict(_options(session)),
            [[p.task, p.digest] for p in inputs.probes],
            [[name, rows.digest] for name, rows in inputs.answers.items()]]  # fmt: skip


def members_of(session: Session, names: Sequence[str]) -> list[Member]:
    """Tasks as `refine` takes them: adapter, calibration rows, answers to prompts, gain."""
    inputs, gain = session.inputs, _losses_of(session).gain
    places = map(inputs.names.index, names)
    return [
        Member(session.adapters[i], inputs.probes[i], float(gain[i]),
               inputs.answers.get(inputs.names[i]))
        for i in places
    ]  # fmt: skip


def _losses_of(session: Session) -> LossTable:
    losses = session.library.losses
    assert losses, "refining needs rows"
    return losses


def refine_merges(session: Session) -> None:
    """Refine every merge -> `refined/<k>/`, `refines.json`."""

    def save(directory: Path, adapter: Adapter) -> None:
        adapter.save(directory / "adapter", session.inputs.base.n_layers)

    parts = []
    for k, entry in enumerate(session.read("merges.json")):
        merged = read_adapter(session.path("merged") / str(k))
        parts.append(_refined(session, entry["members"], merged.digest, merged, save))
    with write_dir(session.path("refined")) as directory:
        for k, part in enumerate(parts):
            shutil.copytree(part / "adapter", directory / str(k))
        mark(directory, "run")
    _remember(session, parts)


def refine_plan(session: Session) -> None:
    """Refine every adapter of a plan, as it is stored -> `refined/`, `refines.json`."""

    def save(directory: Path, form: Compressed) -> None:
        write_compact(directory / COMPACT, [form])

    parts, planned = [], hash_file(session.path("planned") / COMPACT)
    units, forms = session.read("plan.json")["units"], stored_forms(session, "planned")
    for k, (unit, form) in enumerate(zip(units, forms)):
        parts.append(_refined(session, unit["tasks"], [planned, k], form, save))
    refined = OnDemand(lambda k: read_compact(parts[k] / COMPACT, 0), len(parts))
    with write_dir(session.path("refined")) as directory:
        session.inputs.capacity.storage.write(directory, refined)
        mark(directory, "run")
    _remember(session, parts)


def _refined(
    session: Session,
    names: Sequence[str],
    source: object,
    adapter: Form,
    save: Callable[[Path, Form], None],
) -> Path:
    """Refine one adapter, unless that is done already: it takes minutes.

    Args:
        session: the run.
        names: tasks that it serves.
        source: a JSON value that tells the adapter from others.
        adapter: a merge, or an adapter as it is stored.
        save: writes the result into a directory.

    Returns:
        A directory in `refining/`, named by a hash of all that it depends on, with what `save`
        wrote and `refine.json`: members, whether it was refined, divergence before and after
        (null if training overflowed), seconds.
    """
    members = members_of(session, names)
    contents = [[one.adapter.digest, one.gain] for one in members]
    key = fingerprint([refine_inputs(session), list(names), contents, source])
    part = session.path("refining") / key[:32]
    if part.exists():
        return part
    started, progress = time.monotonic(), session.scorer.progress
    refined = refine(session.inputs.base, adapter, members, _options(session), progress)
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


def _options(session: Session) -> RefineOptions:
    return RefineOptions(seed=session.config.seed)


def _remember(session: Session, parts: Sequence[Path]) -> None:
    facts = [json.loads((part / "refine.json").read_text("utf-8")) for part in parts]
    write_json(session.path("refines.json"), facts)
