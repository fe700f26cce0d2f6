"""A plan for a budget in bytes: what is stored of which adapter, and what that loses.

Every task adapter has forms of several sizes around its share of the budget. Their regrets are
estimated, an integer program chooses forms or the bare base model for all tasks, and what it
chooses is measured, which corrects the estimates, until a choice has no estimate left. Merges
follow, with half as many clusters each time, while a partition loses less before compression than
the best plan so far loses in all. Without rows a regret is the squared relative error of dW.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.cluster.partition import Members, groups_of
from d2c_mlx.cluster.search import MergeEstimates, estimated_partition
from d2c_mlx.compress.forms import Candidate, Forms, choose, regret_of
from d2c_mlx.compress.quantize import svd_components
from d2c_mlx.compress.storage import Capacity, allocate, lost_worth, worth
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import merge
from d2c_mlx.merge.methods import MergeOptions

# The default merge loses this share of the estimated regret, which is RegMean's.
_BETTER = 0.6
# Budgets of the frontier, as multiples of the given one.
_FRONTIER = tuple(2 ** (k / 2) for k in range(-4, 3))


@dataclass(frozen=True)
class Plan:
    """What is stored in a budget of bytes.

    Attributes:
        chosen: one candidate for every task or group of tasks, those of the base model too.
        content: `plan.json`: `units` (chosen adapters: tasks, family, scale, levels, nbytes,
            regret), `base` (tasks left to the base model), `regret` (mean over tasks), `frontier`
            (regret at several budgets, of each family alone and of both; null for merges if there
            are none), `trust` (task -> weight of its rows' own answers where it is above 0, see
            `Library.by_teacher`), `candidates` and `measured` (how many there were, and how many
            were measured; the frontier has estimates of the others).
    """

    chosen: tuple[Candidate, ...]
    content: dict[str, Any]


@dataclass(frozen=True)
class OnDemand(Sequence[Any]):
    """A sequence of `n` items that calls `read(k)` whenever the k-th is asked for."""

    read: Callable[[int], Any]
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: Any) -> Any:  # noqa: ANN401  no slices
        return self.read(range(self.n)[k])


def serves_of(content: Mapping[str, Any]) -> dict[str, int | None]:
    """Task -> position of its unit in a `plan.json`; None leaves it to the base model."""
    serves: dict[str, int | None] = dict.fromkeys(content["base"])
    for k, unit in enumerate(content["units"]):
        serves |= dict.fromkeys(unit["tasks"], k)
    return serves


def plan(
    library: Library,
    capacity: Capacity,
    output: Path,
    options: MergeOptions | None = None,
    room: float | None = None,
) -> Plan:
    """Choose what is stored in a budget of bytes, and write it as it was measured.

    For a number of adapters, merges in 16 bit, use `search_by_estimates` instead.

    Args:
        library: the measured library.
        capacity: sizes of its adapters, and bytes of the budget.
        output: an empty directory, which gets the chosen forms, see `CompactStorage.write`.
        options: how merges are made.
        room: bytes for rows, without the header; None takes those of the capacity's budget.

    Raises:
        BudgetError: no choice serves every task.
    """
    room, k = room or capacity.room(), len(library.names)
    forms = Forms(library, capacity, room)
    for i, adapter in enumerate(library.adapters):
        forms.add((i,), adapter)
    chosen = forms.settle()
    while k := k // 2:
        best = sum(form.regret for form in chosen)
        merges = _merges(library, options or MergeOptions(), k, best)
        if not merges:
            break
        for members, (adapter, regret) in sorted(merges.items()):
            forms.add(members, adapter, regret)
        chosen = forms.settle()
    chosen = forms.tune(chosen)
    stored = [form for form in chosen if form.adapter]
    capacity.storage.write(output, OnDemand(lambda j: forms.load(stored[j]), len(stored)))
    return Plan(tuple(chosen), _content(library, capacity, forms.candidates(), chosen, room))


def smallest_plan(
    library: Library, capacity: Capacity, pack: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The smallest plan that is estimated to keep more than a pack of merges, by weights alone.

    Args:
        library: the task adapters.
        capacity: their sizes.
        pack: bytes and `kept` of the merges, as `bench_methods` has them.

    Returns:
        Its `budget` and `kept`; None if no plan is smaller and keeps more.
    """
    adapters = [(svd_components(x), x.modules.items()) for x in library.adapters]
    for share in (0.015, 0.03, 0.0625, 0.125, 0.25):
        if share * capacity.total >= pack["nbytes"]:
            break
        regrets = []
        for (parts, modules), nbytes in zip(adapters, capacity.sizes):
            values, widths = worth(parts, [{}]), {path: sum(lora.shape) for path, lora in modules}
            lost = lost_worth(values, allocate(values, widths, share * nbytes))
            regrets.append(regret_of(lost))
        kept = 1 - sum(regrets) / len(regrets)
        if kept > (pack["kept"] or 1):
            return {"budget": f"{100 * share:g}%", "kept": kept}
    return None


def _merges(
    library: Library, options: MergeOptions, k: int, best: float
) -> dict[Members, tuple[Adapter, float]]:
    """Merge the clusters of a partition into k: members -> merge and summed regret.

    There are none if together they lose at least `best`, measured or estimated.
    """
    taught = library.by_teacher
    estimates = MergeEstimates((library if library.tasks else taught).fading, library.similarity)
    groups = groups_of(estimated_partition(estimates, k))
    costs = {group: float(estimates.of(group).sum()) for group in groups if len(group) > 1}
    # A bad estimate saves merging.
    if _BETTER * sum(costs.values()) >= best:
        return {}
    merges: dict[Members, tuple[Adapter, float]] = {}
    total = 0.0
    # The worst first: one cluster may be enough to reject the whole partition.
    for members in sorted(costs, key=costs.__getitem__, reverse=True):
        merged = merge(taught, members, options)
        regret = merged.regret * len(members)
        if not math.isfinite(regret):  # Its scale was given, so nothing was measured yet.
            regret = float(taught.regrets(merged.adapter, members).sum())
        merges[members] = merged.adapter, regret
        total += regret
        if total >= best:
            return {}
    return merges


def _content(
    library: Library,
    capacity: Capacity,
    candidates: Sequence[Candidate],
    chosen: Sequence[Candidate],
    room: float,
) -> dict[str, Any]:
    """`plan.json`, see `Plan`."""
    names, n = library.names, len(library.names)
    frontier = []
    for multiple in _FRONTIER:
        row: dict[str, Any] = {"share": multiple * room / capacity.total, "merged": None}
        for name in ("own", "merged", "all"):
            offered = [
                form for form in candidates if name == "all" or form.family in (name, "base")
            ]
            # Without a merge, the base model alone would make merges look like a total loss.
            if name != "merged" or any(form.family == name for form in offered):
                row[name] = sum(offered[j].regret for j in choose(offered, n, multiple * room)) / n
        frontier.append(row)
    return {
        "units": [
            {
                "tasks": [names[i] for i in form.members],
                "family": form.family,
                "nbytes": form.nbytes,
                "regret": form.regret / len(form.members),
                "scale": form.scale,
                "levels": {path: [list(level) for level in levels]
                           for path, levels in form.levels.items()},
            }
            for form in chosen if form.adapter
        ],
        "base": [names[form.members[0]] for form in chosen if not form.adapter],
        "regret": sum(form.regret for form in chosen) / n,
        "candidates": len(candidates),
        "measured": sum(form.measured for form in candidates),
        "trust": {name: trust for name, trust in zip(names, library.by_teacher.trust) if trust},
        "frontier": frontier,
    }  # fmt: skip
