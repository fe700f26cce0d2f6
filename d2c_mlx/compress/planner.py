"""Measuring what a pack could hold, from both ends, and planning it: `plan.json`.

The individually compressed end comes first: every task's own adapter at several sizes around its
share of the budget. Then merges, of half as many clusters each time, until a partition loses more
before it is compressed, or is expected to, than the best plan so far loses in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.cluster.local_search import Costs, groups_of, predicted_partition
from d2c_mlx.cluster.partition import Members
from d2c_mlx.compress.allocate import Candidate, choose
from d2c_mlx.compress.candidates import sized, stored
from d2c_mlx.compress.capacity import GROUP_SIZE
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.file_layout import compact_nbytes, make_index
from d2c_mlx.merge.merger import Merged
from d2c_mlx.run.workspace import Workspace

__all__ = ["bare", "make_plan", "measure", "planned", "unit"]

# A summed regret below which a prediction is rounding.
_SAYS = 1e-6

# Budgets of the frontier, as multiples of the one that was asked for.
_FRONTIER = tuple(2 ** (k / 2) for k in range(-4, 3))


def measure(ws: Workspace, rooms: Sequence[float] = ()) -> list[Candidate]:
    """Candidates from both ends; "base" is one for every task.

    Args:
        ws: with its probe table.
        rooms: bytes to plan for; none: what the run's budget leaves.
    """
    n, rooms = len(ws.names), sorted(rooms) or [ws.capacity.room]
    candidates = bare(ws)
    own = [((i,), adapter) for i, adapter in enumerate(ws.adapters)]
    candidates += sized(ws, own, "own", rooms)
    costs, ratio = Costs(ws.problem), 0.0
    for groups in _partitions(ws):
        best = _regret(candidates, choose(candidates, n, rooms[0], ws.config.max_adapters))
        predicted = sum(map(costs.predicted, groups))
        # What the last partition cost, of what single adapters predicted for it, spares the merges.
        if ratio * predicted >= best:
            break
        merges, regret = {}, 0.0
        # The worst first: the whole partition is not merged where one cluster is enough to say no.
        for members in sorted(groups, key=costs.predicted, reverse=True):
            if len(members) > 1 and regret < best:
                one = ws.merger.final(members)
                merges[members] = one.adapter
                regret += _summed(ws, one, members)
        if regret >= best:
            break
        # Of adapters that do each other no harm alone it says nothing.
        ratio = max(0.0, regret) / predicted if predicted > _SAYS else 0.0
        candidates += sized(ws, sorted(merges.items()), "merged", rooms)
    return candidates


def bare(ws: Workspace) -> list[Candidate]:
    """Every task left to the base model, which costs no byte."""
    regrets = ws.expected.under(None, range(len(ws.names)))
    return [Candidate((i,), "base", 0.0, {}, 0, float(one)) for i, one in enumerate(regrets)]


def make_plan(ws: Workspace, candidates: Sequence[Candidate], room: float) -> dict[str, Any]:
    """Choose what fits `room` bytes; a JSON value.

    Returns:
        `units` (adapters chosen: tasks, family, scale, levels, nbytes, regret), `base` (tasks left
        to the base model), `regret` (mean over tasks), `frontier` (at some budgets the regret of
        each family alone, null for merges if none was measured, and of both), `trust` (tasks whose
        rows' own answers had a say, and its weight, see `Expected`) and `candidates` (how many were
        measured).
    """
    n, most = len(ws.names), ws.config.max_adapters
    chosen = _fitting(ws, candidates, room)
    return {
        "units": [_entry(ws, one) for one in chosen if one.family != "base"],
        "base": [ws.names[one.members[0]] for one in chosen if one.family == "base"],
        "regret": sum(one.regret for one in chosen) / n,
        "candidates": len(candidates),
        "trust": {name: one for name, one in zip(ws.names, ws.expected.trust) if one},
        "frontier": list(_frontier(candidates, n, room, ws.capacity.total, most)),
    }


def _fitting(ws: Workspace, candidates: Sequence[Candidate], room: float) -> list[Candidate]:
    """The best choice whose file is no larger than `room` and what is set aside for its header."""
    free = room
    while True:
        chosen = [
            candidates[j] for j in choose(candidates, len(ws.names), free, ws.config.max_adapters)
        ]
        over = _file_nbytes(ws, chosen) - room - ws.capacity.header_nbytes
        if over <= 0:
            return chosen
        free -= over


def _file_nbytes(ws: Workspace, chosen: Sequence[Candidate]) -> int:
    """Of the file; less if components turn out to be zero."""
    some = [one for one in chosen if one.family != "base"]
    units = [unit(ws, one.members) for one in some]
    counts = [
        {path: {bits: n for n, bits in levels} for path, levels in one.levels.items()}
        for one in some
    ]
    base = next((one.base for one in units if one.base), None)
    names = [one.name for one in units]
    return compact_nbytes(make_index(names, base, counts, ws.base.module_shapes, GROUP_SIZE))


def planned(ws: Workspace, plan: dict[str, Any]) -> tuple[list[Compressed], dict[str, int | None]]:
    """The adapters of a plan in their stored form, and which of them serves each task."""
    adapters: list[Compressed] = []
    serves: dict[str, int | None] = dict.fromkeys(plan["base"])
    for entry in plan["units"]:
        members = tuple(ws.names.index(name) for name in entry["tasks"])
        serves |= dict.fromkeys(entry["tasks"], len(adapters))
        adapters.append(stored(unit(ws, members), entry["levels"], entry["scale"]))
    return adapters, serves


def unit(ws: Workspace, members: Members) -> Adapter:
    """A task's own adapter, or the merge that serves several, as it is before it is stored."""
    return ws.adapters[members[0]] if len(members) == 1 else ws.merger.final(members).adapter


def _partitions(ws: Workspace) -> Iterator[list[Members]]:
    """What single adapters predict to be good clusters, fewer each time."""
    k = len(ws.names)
    while k > 1:
        k //= 2
        yield groups_of(predicted_partition(ws.problem, k))


def _summed(ws: Workspace, merged: Merged, members: Members) -> float:
    if merged.regret is not None:
        return merged.regret * len(members)
    # Its scale was given, so nothing was measured yet.
    return float(ws.expected.under(merged.adapter, members).sum())


def _regret(candidates: Sequence[Candidate], chosen: Sequence[int]) -> float:
    return sum(candidates[j].regret for j in chosen)


def _entry(ws: Workspace, one: Candidate) -> dict[str, Any]:
    return {
        "tasks": [ws.names[i] for i in one.members],
        "family": one.family,
        "nbytes": one.nbytes,
        "regret": one.regret / len(one.members),
        "scale": one.scale,
        "levels": {path: [list(level) for level in some] for path, some in one.levels.items()},
    }


def _frontier(
    candidates: Sequence[Candidate], n: int, free: float, total: int, most: int | None
) -> Iterator[dict[str, Any]]:
    """The best of what was measured at several budgets, of each family alone and of all."""
    for multiple in _FRONTIER:
        row: dict[str, Any] = {"share": multiple * free / total, "merged": None}
        for name, families in (("own", ("own",)), ("merged", ("merged",)),
                               ("all", ("own", "merged"))):  # fmt: skip
            some = [one for one in candidates if one.family in ("base", *families)]
            # The rows for the base model alone would say that merges lose everything.
            if name != "merged" or any(one.family == name for one in some):
                row[name] = _regret(some, choose(some, n, multiple * free, most)) / n
        yield row
