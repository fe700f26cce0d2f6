"""The refine stage of a run: trains each merge, and keeps each as soon as it is done."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.merge.refine import Member, Refined, RefineOptions, refine
from d2c_mlx.packs.overwrite import mark
from d2c_mlx.run.session import Session
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.files import fingerprint, write_dir, write_json

__all__ = ["refine_cluster", "refine_inputs", "refine_merge"]


def _options(session: Session) -> RefineOptions:
    c = session.config
    return RefineOptions(steps=c.refine_steps, rate=c.refine_rate, seed=c.seed)


def refine_inputs(session: Session) -> list[object]:
    """Everything that refining depends on besides adapters and merges, as a JSON value."""
    inputs = session.inputs
    return [VERSION, inputs.base.fingerprint, dataclasses.asdict(_options(session)),
            [[p.task, p.digest] for p in inputs.probes],
            [[name, rows.digest] for name, rows in inputs.answers.items()]]  # fmt: skip


def refine_merge(session: Session, merged: Adapter, indices: Sequence[int]) -> Refined:
    """Refine one merge; use `refine_cluster` to keep the result in the run directory.

    Args:
        session: the run.
        merged: the merge.
        indices: positions of its members in `session.adapters`.
    """
    return refine(
        session.inputs.base, merged, _members(session, indices), _options(session),
        session.evaluator.meter,
    )  # fmt: skip


def _members(session: Session, indices: Sequence[int]) -> list[Member]:
    inputs, gain = session.inputs, session.study.losses.gain
    return [
        Member(session.adapters[i], inputs.probes[i], float(gain[i]),
               inputs.answers.get(inputs.names[i]))
        for i in indices
    ]  # fmt: skip


def refine_cluster(session: Session, k: int, names: Sequence[str], kept: Path) -> Path:
    """Refine one cluster's merge, unless that is done already.

    Args:
        session: the run.
        k: number of the merge in `merged/`.
        names: names of its members.
        kept: directory of the refined merges that are done.

    Returns:
        A directory below `kept`, named by a hash of all that it depends on, with `adapter/` and
        `refine.json`: members, whether it was refined, divergence before and after, seconds.
    """
    merged = load_adapter(session.path("merged") / str(k))
    indices = [session.inputs.names.index(name) for name in names]
    contents = [[one.adapter.digest, one.gain] for one in _members(session, indices)]
    part = kept / fingerprint([refine_inputs(session), list(names), contents, merged.digest])[:32]
    if part.exists():
        return part
    started = time.monotonic()
    refined = refine_merge(session, merged, indices)
    facts = {
        "members": list(names),
        "refined": refined.adapter is not merged,
        "divergence": {"before": refined.before, "after": refined.after},
        "seconds": round(time.monotonic() - started, 2),
    }
    with write_dir(part) as directory:
        refined.adapter.save(directory / "adapter", session.inputs.base.n_layers)
        write_json(directory / "refine.json", facts)
        mark(directory, "run")
    return part
