"""The planner of a budget in bytes: chooses a pack among candidates.

Task adapters come first, each compressed to several sizes around its share of the budget. Merges
follow, with half as many clusters each time. The search ends when a partition loses more before
compression, measured or estimated, than the best plan so far loses in all.

All candidates are estimated, and those that are chosen are measured. Without rows, a
regret is the squared relative error of dW, and `search` needs no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from d2c_mlx.adapters.gguf_format import GgufAdapter
from d2c_mlx.cluster.estimates import MergeEstimates
from d2c_mlx.cluster.partition import Members, groups_of
from d2c_mlx.cluster.search import estimated_partition
from d2c_mlx.compress.allocate import Candidate, choose
from d2c_mlx.compress.candidates import FormMeter
from d2c_mlx.compress.capacity import Capacity
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.estimates import FormErrors, FormEstimates
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merging import Merged, merge
from d2c_mlx.merge.options import MergeOptions
from d2c_mlx.utils.sequences import OnDemand

__all__ = ["Plan", "Planner", "serves_of"]

# A summed regret below this is rounding.
_ROUNDING = 1e-6
# The default merge loses this share of the estimated regret, which is RegMean's.
_BETTER = 0.6
# Scales are not searched for the best forms, which hold this share of the regret together.
_LIGHT = 0.2
# Budgets of the frontier, as multiples of the given one.
_FRONTIER = tuple(2 ** (k / 2) for k in range(-4, 3))


@dataclass(frozen=True)
class Plan:
    """The chosen candidates, and the record of the choice.

    Attributes:
        chosen: one candidate for every task or group of tasks, those of the base model too.
        content: `plan.json`: `units` (chosen adapters: tasks, family, scale, levels, nbytes,
            regret), `base` (tasks left to the base model), `regret` (mean over tasks), `frontier`
            (regret at several budgets, of each family alone and of both; null for merges if none
            was measured), `trust` (task -> weight of its rows' own answers where it is above 0,
            see `Library.by_teacher`), `candidates` and `measured` (how many there were, and how
            many were measured; the frontier has estimates of the others).
    """

    chosen: tuple[Candidate, ...]
    content: dict[str, Any]

    @property
    def serves(self) -> dict[str, int | None]:
        """Task -> position in `adapters`; None leaves it to the base model."""
        return serves_of(self.content)

    @property
    def adapters(self) -> Sequence[Compressed | GgufAdapter]:
        """The stored form of every unit, read when asked for, as `content["units"]` orders them."""
        units = [one for one in self.chosen if one.stored]
        return OnDemand(lambda k: units[k].load(), len(units))


def serves_of(plan: Mapping[str, Any]) -> dict[str, int | None]:
    """Task -> position of its unit in a `plan.json`; None leaves it to the base model."""
    serves: dict[str, int | None] = dict.fromkeys(plan["base"])
    for k, unit in enumerate(plan["units"]):
        serves |= dict.fromkeys(unit["tasks"], k)
    return serves


@dataclass(frozen=True)
class Planner:
    """Plans a budget in bytes for a measured library.

    For a number of adapters, merges in 16 bit, use `cluster.d2c` instead.

    Attributes:
        library: the measured library.
        capacity: sizes, and bytes of the budget.
        options: how merges beside the adapters are made.
    """

    library: Library
    capacity: Capacity
    options: MergeOptions = MergeOptions()

    def search(self, room: float | None = None) -> Plan:
        """Plan by estimates: what is chosen is measured, until a choice has no estimate left.

        Args:
            room: bytes for rows, without the header, see `Capacity.room_of`; None takes those of
                the capacity's budget.

        Raises:
            BudgetError: no choice serves every task.
        """
        forms, room = self.forms, room or self.capacity.room
        by_weights = not self.library.tasks
        found = FormErrors(forms) if by_weights else FormEstimates(forms)
        own = [((i,), adapter) for i, adapter in enumerate(self.library.adapters)]
        for unit, ladder in zip(own, forms.ladders(own, "own", room)):
            found.add(ladder, forms.fair(*unit, room))
        # The base model's regret is about 1.
        n = len(self.library.names)
        bare = [replace(_bare(i, 1.0), measured=False) for i in range(n)]
        chosen, bare = self._settled(found, bare, room)
        merging = self._merging()
        while merges := merging(sum(one.regret for one in chosen)):
            some = sorted(merges.items())
            units = [(members, one.adapter) for members, one in some]
            for (members, one), ladder in zip(some, forms.ladders(units, "merged", room)):
                share = forms.fair(members, one.adapter, room)
                found.add(ladder, share, self._summed(one, members))
            chosen, bare = self._settled(found, bare, room)
        found.tune(_heaviest(chosen))
        chosen, bare = self._settled(found, bare, room)
        return self._planned([*bare, *found.candidates()], chosen, room)

    def _settled(
        self, found: FormEstimates | FormErrors, bare: Sequence[Candidate], room: float
    ) -> tuple[list[Candidate], list[Candidate]]:
        """The choice of which nothing is estimated, and the candidates of the base model."""
        bare = list(bare)
        while True:
            chosen = self.fitting([*bare, *found.candidates()], room)
            missing = [one for one in chosen if not one.measured]
            if not missing:
                return chosen, bare
            tasks = [one.members[0] for one in missing if one.family == "base"]
            if tasks:
                for i, regret in zip(tasks, self.library.by_teacher.regrets(None, tasks)):
                    bare[i] = _bare(i, float(regret))
            found.measure([one for one in missing if one.family != "base"])

    def _merging(self) -> Callable[[float], dict[Members, Merged]]:
        """A callable that takes the best regret so far and makes the next partition's merges.

        It gives none once a partition loses more, measured or estimated, than the best plan.
        """
        library, ratio = self.library.by_teacher, _BETTER
        fading = self.library.fading if self.library.tasks else library.fading
        estimates, k = MergeEstimates(fading, library.similarity), len(library.names)

        def next_merges(best: float) -> dict[Members, Merged]:
            nonlocal ratio, k
            k //= 2
            groups = groups_of(estimated_partition(estimates, k)) if k else []
            costs = {one: float(estimates.of(one).sum()) for one in groups if len(one) > 1}
            # A bad estimate saves merging.
            if ratio * sum(costs.values()) >= best:
                return {}
            merges, regret = {}, 0.0
            # The worst first: one cluster may be enough to reject the whole partition.
            for members in sorted(costs, key=costs.__getitem__, reverse=True):
                if regret < best:
                    merges[members] = merge(library, members, self.options)
                    regret += self._summed(merges[members], members)
            # The last partition's cost, relative to its estimate, corrects that of the next.
            estimated = sum(costs[members] for members in merges)
            ratio = max(0.0, regret) / estimated if estimated > _ROUNDING else _BETTER
            return merges if regret < best else {}

        return next_merges

    @cached_property
    def forms(self) -> FormMeter:
        """The meter of stored forms for this library and budget."""
        return FormMeter(self.library, self.capacity)

    def _planned(
        self, candidates: Sequence[Candidate], chosen: Sequence[Candidate], room: float
    ) -> Plan:
        names, trust = self.library.names, self.library.by_teacher.trust
        content = {
            "units": [self._entry(one) for one in chosen if one.family != "base"],
            "base": [names[one.members[0]] for one in chosen if one.family == "base"],
            "regret": sum(one.regret for one in chosen) / len(names),
            "candidates": len(candidates),
            "measured": sum(one.measured for one in candidates),
            "trust": {name: one for name, one in zip(names, trust) if one},
            "frontier": list(self._frontier(candidates, room)),
        }
        return Plan(tuple(chosen), content)

    def fitting(self, candidates: Sequence[Candidate], room: float) -> list[Candidate]:
        """The best choice whose files, with headers, are no larger than the budget."""
        free = room
        while True:
            chosen = [candidates[j] for j in choose(candidates, len(self.library.names), free)]
            over = self.capacity.storage.total(chosen) - room - self.capacity.header_nbytes
            if over <= 0:
                return chosen
            free -= over

    def _summed(self, merged: Merged, members: Members) -> float:
        if math.isfinite(merged.regret):
            return merged.regret * len(members)
        # Its scale was given, so nothing was measured yet.
        return float(self.library.by_teacher.regrets(merged.adapter, members).sum())

    def _entry(self, one: Candidate) -> dict[str, Any]:
        return {
            "tasks": [self.library.names[i] for i in one.members],
            "family": one.family,
            "nbytes": one.nbytes,
            "regret": one.regret / len(one.members),
            "scale": one.scale,
            "levels": {path: [list(level) for level in some] for path, some in one.levels.items()},
        }

    def _frontier(self, candidates: Sequence[Candidate], free: float) -> Iterator[dict[str, Any]]:
        """The least regret at several budgets, of each family alone and of all."""
        n, total = len(self.library.names), self.capacity.total
        for multiple in _FRONTIER:
            row: dict[str, Any] = {"share": multiple * free / total, "merged": None}
            for name, families in (("own", ("own",)), ("merged", ("merged",)),
                                   ("all", ("own", "merged"))):  # fmt: skip
                some = [one for one in candidates if one.family in ("base", *families)]
                # Without a merge, the base model alone would make merges look like a total loss.
                if name != "merged" or any(one.family == name for one in some):
                    row[name] = _regret(some, choose(some, n, multiple * free)) / n
            yield row


def _bare(task: int, regret: float) -> Candidate:
    """The candidate that leaves a task to the base model."""
    return Candidate((task,), "base", 0.0, {}, 0, regret)


def _heaviest(chosen: Sequence[Candidate]) -> list[Candidate]:
    """The stored candidates that hold nearly all of the regret, the worst first.

    A scale gains a share of a form's regret, so that of the others would not show.
    """
    stored = sorted((one for one in chosen if one.stored), key=lambda one: -one.regret)
    regrets = np.maximum([one.regret for one in stored], 0.0)
    before = np.cumsum(regrets) - regrets
    return [one for one, some in zip(stored, before) if some < (1 - _LIGHT) * regrets.sum()]


def _regret(candidates: Sequence[Candidate], chosen: Sequence[int]) -> float:
    return sum(candidates[j].regret for j in chosen)
