"""Measuring what a pack could hold, from both ends, and planning it: `plan.json`.

The individually compressed end comes first: every task's own adapter at several sizes around its
share of the budget. Then merges, of half as many clusters each time, until a partition loses more
before it is compressed, or is expected to, than the best plan so far loses in all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from d2c_mlx.adapter import Adapter
from d2c_mlx.cluster import Members
from d2c_mlx.merge.core import to_core
from d2c_mlx.moves import Costs, groups_of, predicted_partition
from d2c_mlx.plan import Candidate, allocate, choose
from d2c_mlx.probe import Job
from d2c_mlx.quantize import Compressed, compress
from d2c_mlx.rounding import Levels, columns
from d2c_mlx.workspace import GROUP_SIZE, Workspace

__all__ = ["Form", "candidates_of", "make_plan", "measure", "planned", "worth"]

# Sizes that are tried: so many times smaller and larger than an equal share of the budget, on a
# grid of their own, so that plans for several budgets ask the same. Steps are powers of two: a
# merge costs all its tasks' probes, and matters only where bytes are scarce.
_SMALLER, _LARGER = 4, 4
_STEPS = {"own": 0.5, "merged": 1.0}
# Share of the worth that all modules get alike.
_EVENLY = 0.25
# Budgets of the frontier, as multiples of the one that was asked for.
_FRONTIER = tuple(2 ** (k / 2) for k in range(-4, 3))

Units = Sequence[tuple[Members, Adapter]]
Form = tuple[Members, Adapter, Mapping[str, Levels]]


def measure(ws: Workspace, rooms: Sequence[float] = ()) -> list[Candidate]:
    """Candidates from both ends; "base" is one for every task.

    Args:
        ws: with its probe table.
        rooms: bytes to plan for; none: what the run's budget leaves.
    """
    n, rooms = len(ws.names), sorted(rooms) or [ws.room]
    base = ws.problem.regret(ws.table.base)
    candidates = [Candidate((i,), "base", 0.0, {}, 0, float(base[i])) for i in range(n)]
    own = [((i,), adapter) for i, adapter in enumerate(ws.adapters)]
    candidates += _measured(ws, own, "own", rooms)
    costs, ratio = Costs(ws.problem), 0.0
    for groups in _partitions(ws):
        best = _regret(candidates, choose(candidates, n, rooms[0], ws.config.max_adapters))
        predicted = sum(map(costs.predicted, groups))
        # What the last partition cost, of what single adapters predicted for it, spares the merges.
        if ratio * predicted >= best:
            break
        merges = [(members, ws.merger.final(members)) for members in groups if len(members) > 1]
        regret = sum((one.regret or 0.0) * len(members) for members, one in merges)
        if regret >= best:
            break
        ratio = max(0.0, regret) / max(predicted, 1e-9)
        candidates += _measured(ws, [(m, one.adapter) for m, one in merges], "merged", rooms)
    return candidates


def make_plan(ws: Workspace, candidates: Sequence[Candidate], room: float) -> dict[str, Any]:
    """Choose what fits `room` bytes; a JSON value.

    Returns:
        `units` (adapters chosen: tasks, family, levels, nbytes, regret), `base` (tasks left to the
        base model), `regret` (mean over tasks), `frontier` (at some budgets the regret of each
        family alone and of both) and `candidates` (how many were measured).
    """
    n, most = len(ws.names), ws.config.max_adapters
    chosen = [candidates[j] for j in choose(candidates, n, room, most)]
    return {
        "units": [_entry(ws, one) for one in chosen if one.family != "base"],
        "base": [ws.names[one.members[0]] for one in chosen if one.family == "base"],
        "regret": sum(one.regret for one in chosen) / n,
        "candidates": len(candidates),
        "frontier": list(_frontier(candidates, n, room, sum(ws.sizes), most)),
    }


def planned(ws: Workspace, plan: dict[str, Any]) -> tuple[list[Compressed], dict[str, int | None]]:
    """The adapters of a plan in their stored form, and which of them serves each task."""
    adapters: list[Compressed] = []
    serves: dict[str, int | None] = dict.fromkeys(plan["base"])
    for entry in plan["units"]:
        members = tuple(ws.names.index(name) for name in entry["tasks"])
        adapter = ws.adapters[members[0]] if len(members) == 1 else ws.merger.final(members).adapter
        serves |= dict.fromkeys(entry["tasks"], len(adapters))
        adapters.append(compress(adapter, {p: entry["levels"].get(p, ()) for p in adapter.modules},
                                 GROUP_SIZE))  # fmt: skip
    return adapters, serves


def _partitions(ws: Workspace) -> Iterator[list[Members]]:
    """What single adapters predict to be good clusters, fewer each time."""
    k = len(ws.names)
    while k > 1:
        k //= 2
        yield groups_of(predicted_partition(ws.problem, k))


def _measured(ws: Workspace, units: Units, family: str, rooms: Sequence[float]) -> list[Candidate]:
    """Every unit at several sizes."""
    values = [worth(adapter, [ws.gains[i] for i in members]) for members, adapter in units]
    widths = {path: sum(shape) for path, shape in ws.base.module_shapes.items()}
    whole = [ws.packed(adapter).nbytes(ws.base.n_layers) for _, adapter in units]
    found: list[Candidate] = []
    known: set[tuple[int, str]] = set()
    for share in _grid(rooms[0] / sum(whole), rooms[-1] / sum(whole), _STEPS[family]):
        forms = []
        for u, unit in enumerate(units):
            levels = allocate(values[u], widths, share * whole[u])
            levels = {path: some for path, some in levels.items() if some}
            if levels and (u, repr(levels)) not in known:
                known.add((u, repr(levels)))
                forms.append((*unit, levels))
        found += candidates_of(ws, forms, family, share)
    return found


def candidates_of(
    ws: Workspace, forms: Sequence[Form], family: str, share: float
) -> list[Candidate]:
    """Measure units in stored forms, all on the probes of their members.

    Args:
        ws: with its probe table.
        forms: members, their adapter, and the levels of some of its modules.
        family: of the candidates.
        share: of the 16-bit bytes, as the candidates say it.
    """
    jobs: list[Job] = []
    for members, adapter, levels in forms:
        every = {path: levels.get(path, ()) for path in adapter.modules}
        plain = compress(adapter, every, GROUP_SIZE).adapter(ws.base.dtype)
        jobs.append((plain, [ws.probes[i] for i in members]))
    found = []
    for (members, _, levels), losses in zip(forms, ws.evaluator.losses(jobs)):
        regret = float(ws.problem.regret(losses, np.array(members)).sum())
        nbytes = _rows_nbytes(ws, levels) + _counts_nbytes(ws)
        found.append(Candidate(members, family, share, levels, nbytes, regret))
    return found


def _grid(least: float, most: float, step: float) -> list[float]:
    """Powers of `2 ** step` around shares of the 16-bit bytes; 0.35 is more than 4 bits take."""
    ends = math.log2(least / _SMALLER), math.log2(min(most * _LARGER, 0.35))
    first, last = (round(end / step) for end in ends)
    return [2 ** (k * step) for k in range(first, last + 1)]


def worth(adapter: Adapter, gains: Sequence[Mapping[str, float]]) -> dict[str, np.ndarray]:
    """What each component is worth: its share of its module's energy, times the module's gain.

    Ten rows say roughly what a module gains, so a part of the worth is shared out evenly.

    Args:
        adapter: of one task, or a merge.
        gains: of the tasks that it serves, see `attribution.module_gains`; each counts alike.
    """
    totals = [sum(max(0.0, gain) for gain in one.values()) or 1.0 for one in gains]
    values = {}
    with threadpool_limits(1):
        for path, lora in adapter.modules.items():
            core = to_core([lora.factors()]).weighted_sum(np.ones(1))
            energy = np.linalg.svd(core, compute_uv=False) ** 2
            gain = sum(max(0.0, one.get(path, 0.0)) / t for one, t in zip(gains, totals))
            share = (1 - _EVENLY) * gain / len(gains) + _EVENLY / len(adapter.modules)
            values[path] = share * energy / max(float(energy.sum()), 1e-30)
    return values


def _rows_nbytes(ws: Workspace, levels: Mapping[str, Levels]) -> int:
    total = 0
    for path, some in levels.items():
        for n, bits in some:
            for width in ws.base.module_shapes[path]:
                words, groups = columns(width, bits, GROUP_SIZE)
                total += n * ((2 if bits == 16 else 4) * words + 4 * groups)
    return total


def _counts_nbytes(ws: Workspace) -> int:
    """Of one adapter in the index: a byte per module and bits."""
    return 3 * len(ws.target_paths)


def _regret(candidates: Sequence[Candidate], chosen: Sequence[int]) -> float:
    return sum(candidates[j].regret for j in chosen)


def _entry(ws: Workspace, one: Candidate) -> dict[str, Any]:
    return {
        "tasks": [ws.names[i] for i in one.members],
        "family": one.family,
        "nbytes": one.nbytes,
        "regret": one.regret / len(one.members),
        "levels": {path: [list(level) for level in some] for path, some in one.levels.items()},
    }


def _frontier(
    candidates: Sequence[Candidate], n: int, free: float, total: int, most: int | None
) -> Iterator[dict[str, Any]]:
    """The best of what was measured at several budgets, of each family alone and of all."""
    for multiple in _FRONTIER:
        row: dict[str, Any] = {"share": multiple * free / total}
        for name, families in (("own", ("own",)), ("merged", ("merged",)),
                               ("all", ("own", "merged"))):  # fmt: skip
            some = [one for one in candidates if one.family in ("base", *families)]
            row[name] = _regret(some, choose(some, n, multiple * free, most)) / n
        yield row
