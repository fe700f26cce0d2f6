"""A measured library: its losses, regrets and merges.

A `Library` is measured; a `Study` holds the results. Clusterings use `Study.problem`, merges come
from `Study.merger`, and stored forms are judged by `Study.teacher_regret`. A `WeightStudy` has the
same where there are no rows, from weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.similarity import svd_features
from d2c_mlx.cluster.merge_estimates import STRENGTHS
from d2c_mlx.cluster.partition import Fading, Members, Problem
from d2c_mlx.evaluate.attribution import module_gains
from d2c_mlx.evaluate.loss_table import LossTable
from d2c_mlx.merge.kl_regret import StoredRegret, TeacherRegret, WeightRegret
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.merger import Merger
from d2c_mlx.merge.options import MergeOptions

__all__ = ["Study", "WeightStudy"]


@dataclass(frozen=True)
class Study:
    """A measured library and its results, each computed on first use.

    Attributes:
        library: the adapters, their calibration rows and the engine that evaluates them.
        losses: losses of the adapters on the tasks' calibration rows.
        options: how to merge.
        by_teacher: tune merges by teacher targets, as stored forms are, because a plan compares
            both; else by the answers in the rows.
    """

    library: Library
    losses: LossTable
    options: MergeOptions
    by_teacher: bool = False

    @cached_property
    def module_gains(self) -> list[dict[str, float]]:
        """The gain of every module of each adapter on its task's calibration rows, in nats."""
        library = self.library
        # A pass forwards and one backwards.
        costs = [3 * probe.n_tokens for probe in library.probes]
        library.evaluator.meter.expect(sum(costs))
        found = []
        for adapter, probe, cost in zip(library.adapters, library.probes, costs):
            cache = library.evaluator.cache
            found.append(module_gains(library.base, adapter, probe, cache=cache))
            library.evaluator.meter.advance(cost)
        return found

    @cached_property
    def teacher_regret(self) -> StoredRegret:
        """Regrets by teacher targets."""
        return self._teacher

    @cached_property
    def _teacher(self) -> TeacherRegret:
        return TeacherRegret(self.library, self.losses)

    @cached_property
    def merger(self) -> Merger:
        """The merger of these adapters, which merges each set of members once."""
        if not self.by_teacher:
            return self.merger_with(self.options)
        teacher = self._teacher
        # Merges of a plan are compared with other forms, on the calibration rows alone.
        library = replace(self.library, probes=teacher.sets, answers={})
        return Merger(library, self.options, teacher.regret)

    def merger_with(self, options: MergeOptions) -> Merger:
        """A merger with other options, tuned by the answers in the rows."""
        return Merger(self.library, options, self.losses.regret)

    @cached_property
    def problem(self) -> Problem:
        """The problem that clusterings solve, measured on the model."""
        return Problem(
            merge=lambda members, like=(): self.merger.quick(members, like).adapter,
            measure=self._measure,
            features=svd_features(self.library.similarity),
            fading=Fading(self.losses.strengths, self.losses.regret(self.losses.weakened)),
            similarity=self.library.similarity,
            foresee=self._foresee,
        )

    def _foresee(self, merges: Sequence[Members]) -> None:
        tokens = [probe.n_tokens for probe in self.library.probes]
        n_tokens = sum(tokens[i] for members in merges for i in members)
        self.library.evaluator.meter.foresee(n_tokens)

    def _measure(self, jobs: Sequence[tuple[Adapter, Sequence[int]]]) -> list[np.ndarray]:
        probes = self.library.probes
        sets = [(merge, [probes[i] for i in tasks]) for merge, tasks in jobs]
        return [
            self.losses.regret(losses, np.array(tasks, int))
            for losses, (_, tasks) in zip(self.library.evaluator.losses(sets), jobs)
        ]


# The regret of a weakened adapter: medians over 24 real ones.
_FADED = (0.72, 0.25)


@dataclass(frozen=True)
class WeightStudy(Study):
    """The study of a library without rows: errors of dW stand for losses, and modules count alike.

    Use it like a `Study`; `losses` is not read. `by_teacher` makes merges the closest in dW, which
    a plan compares with other forms.
    """

    @cached_property
    def module_gains(self) -> list[dict[str, float]]:
        """A gain of 1 for every module of each adapter."""
        return [dict.fromkeys(adapter.modules, 1.0) for adapter in self.library.adapters]

    @cached_property
    def teacher_regret(self) -> StoredRegret:
        """Regrets by errors of dW."""
        return WeightRegret(self.library.adapters)

    @cached_property
    def merger(self) -> Merger:
        """The merger of these adapters, by a method that needs no rows."""
        o = self.options
        if self.by_teacher:  # The mean is the closest update, cut to its rank.
            o = replace(o, method=o.method or "linear", scale=o.scale or 1.0)
        return self.merger_with(o)

    @cached_property
    def problem(self) -> Problem:
        """The problem that clusterings solve, with errors of dW as its regrets."""
        n, strengths = len(self.library.adapters), np.array(STRENGTHS)
        # Orthogonal updates: a mean of m is off by 1 - 1 / m, where `MergeEstimates` has m ** -0.5.
        faded = 1 - strengths**2 if self.by_teacher else np.array(_FADED)
        return Problem(
            merge=lambda members, like=(): self.merger.quick(members, like).adapter,
            measure=lambda jobs: [self.teacher_regret.under(merge, tasks) for merge, tasks in jobs],
            features=svd_features(self.library.similarity),
            fading=Fading(STRENGTHS, np.tile(faded, (n, 1))),
            similarity=self.library.similarity,
        )
