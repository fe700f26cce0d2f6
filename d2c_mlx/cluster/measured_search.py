"""The search by estimates: it measures the few partitions that are estimated to be best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from d2c_mlx.cluster.estimated_search import State, estimated_partition, improved
from d2c_mlx.cluster.merge_estimates import MergeEstimates
from d2c_mlx.cluster.partition import (
    Clustering,
    Labels,
    Members,
    Problem,
    canonical,
    groups_of,
    kmeans,
)

__all__ = ["MOST_FAILED", "search_by_estimates"]

# Proposals in a row that may fail to lower the measured regret.
MOST_FAILED = 3
# Moves and swaps that are tried from one partition until it is taken as the best: one for so many
# tasks, and at most so many. Of fewer tasks the proposals leave little to try.
_TASKS_A_TRY, MOST_TRIED, _FEWEST = 3, 8, 9
# A step must help its tasks by so many standard errors of their mean: with few rows, single tasks
# win what others lose. Of 24 adapters with ten rows each, steps that held-out rows confirmed had
# 0.36 and more; of six with four rows, one that they did not confirm had 0.21.
_BEYOND_LUCK = 0.3
# Further evaluations, typically, until the scale of the first merge is found.
_TUNINGS = 3


def search_by_estimates(problem: Problem, n_clusters: int, seed: int, eps: float) -> Clustering:
    """Measure the partition that is estimated to be best, learn from it, and propose again.

    The first proposal is K-Means. Only clusters that are proposed are measured, each at the scale
    of the first one. Where no other partition is estimated to win, or several in a row did not,
    single moves and swaps are measured, the most promising first.

    Args:
        problem: its `fading` and `similarity` give the estimates.
        n_clusters: K, below N.
        seed: seed of K-Means.
        eps: a proposal must be estimated, and measured, to lower the mean regret by more.

    Returns:
        The best measured partition; its history has every one that was measured whole.
    """
    found = _Measured(problem)
    history: list[dict[str, Any]] = []
    best: Labels = ()
    lowest, failed = np.inf, 0
    # K-Means puts alike adapters together, of which the estimates know least.
    proposal = kmeans(problem.features, n_clusters, seed).labels
    while True:
        problem.foresee(found.ahead(proposal, MOST_FAILED - failed))
        objective = found.measure(proposal)
        history.append({"objective": objective, "labels": list(proposal)})
        failed += 1
        if objective < lowest - eps:
            best, lowest, failed = proposal, objective, 0
        if failed > MOST_FAILED:
            break
        others = {improved(found.estimates, one) for one in (best, proposal)}
        others.add(estimated_partition(found.estimates, n_clusters))
        costs = {one: found.expected(one) for one in sorted(others)}
        proposal = min(costs, key=costs.__getitem__)
        if costs[proposal] >= lowest - eps:
            break
    while better := _measured_step(found, best, eps):
        best, lowest = better, found.expected(better)
        history.append({"objective": lowest, "labels": list(best)})
    problem.foresee([])
    return Clustering("d2c", best, lowest, history, seed, "estimates", "converged")


class _Measured:
    """Measured costs of clusters, the summed regret of their tasks, and what they teach."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.estimates = MergeEstimates(problem.fading, problem.similarity)
        self._known: dict[Members, float] = {}
        self._regrets: dict[Members, np.ndarray] = {}

    def regrets(self, groups: Iterable[Members]) -> np.ndarray:
        """Measured regrets of the tasks of some clusters, by task; 0 for a task alone."""
        groups = sorted(groups)
        tasks = np.argsort([i for members in groups for i in members])
        return np.concatenate([self._regrets.get(one, np.zeros(1)) for one in groups])[tasks]

    def measure(self, labels: Labels) -> float:
        """Mean regret of all tasks; only clusters that are not known are measured."""
        self._learn(self._unknown(labels))
        return self.expected(labels)

    def cost(self, members: Members) -> float:
        """The cost of one cluster, measured if it is not known."""
        self._learn([members] if members not in self._known and len(members) > 1 else [])
        return self.guess(members)

    def guess(self, members: Members) -> float:
        """The cost of one cluster, measured where it is known, else estimated."""
        return self._known.get(members, float(self.estimates.of(members).sum()))

    def expected(self, labels: Labels) -> float:
        """Mean regret of all tasks, measured where it is known, else estimated."""
        return sum(map(self.guess, groups_of(labels))) / self.estimates.n

    def ahead(self, labels: Labels, proposals: int) -> list[Members]:
        """Merges to measure: a partition, and of further proposals about the half that is new."""
        new = self._unknown(labels)
        tunings = [] if self._known else new[:1] * _TUNINGS
        return [*tunings, *new, *[tuple(range(len(labels)))] * (proposals // 2)]

    def _unknown(self, labels: Labels) -> list[Members]:
        new = [one for one in groups_of(labels) if one not in self._known and len(one) > 1]
        return sorted(new, key=len, reverse=True)

    def _learn(self, new: Sequence[Members]) -> None:
        # The first, the largest, finds the scale for all.
        like = next(iter(self._known), ())
        found = {}
        for members in new:
            merged = self._problem.merge(members, like)
            like = like or members
            (found[members],) = self._problem.measure([(merged, members)])
            self._known[members] = float(found[members].sum())
        if found:
            self._regrets |= found
            self.estimates.learn(found)


def _measured_step(found: _Measured, labels: Labels, eps: float) -> Labels | None:
    """The first move or swap that lowers the measured mean regret by more than `eps` and luck.

    The most promising are tried first; None once several did not.
    """
    tried: set[Labels] = set()
    least = eps * len(labels)
    n_tries = len(labels) // _TASKS_A_TRY if len(labels) >= _FEWEST else 0
    for _ in range(min(MOST_TRIED, n_tries)):
        steps = [one for one in _promising(found, labels) if one[1] not in tried]
        if not steps:
            return None
        _, step = min(steps)
        tried.add(step)
        old, new = set(groups_of(labels)), set(groups_of(step))
        most = sum(map(found.cost, old - new)) - least
        # A cluster hardly ever costs less than 0, so one is mostly enough to refuse a step.
        first, second = sorted(new - old, key=found.guess, reverse=True)
        if found.cost(first) >= most or found.cost(first) + found.cost(second) >= most:
            continue
        gains = found.regrets(old - new) - found.regrets(new - old)
        if gains.sum() > _BEYOND_LUCK * gains.std(ddof=1) * np.sqrt(len(gains)):
            return step
    return None


def _promising(found: _Measured, labels: Labels) -> list[tuple[float, Labels]]:
    """(Estimated change of the summed regret, partition) of some moves and swaps, best ones."""
    state = State(found.estimates, np.array(labels))
    # What the estimates of the clusters now are wrong by.
    known = np.array([found.guess(one) for one in groups_of(labels)])
    wrong = state.costs - known
    gains = state.gains()
    order = np.argsort(gains + wrong[state.labels][:, None] + wrong, axis=None)[: 2 * MOST_TRIED]
    moves = [{int(i): int(k)} for i, k in zip(*np.unravel_index(order, gains.shape))
             if np.isfinite(gains[i, k])]  # fmt: skip
    steps = []
    for step in moves + state.promising_swaps(gains)[: 2 * MOST_TRIED]:
        after = state.after(step)
        if (changed := canonical(after.labels)) == labels:
            continue  # two that are alone have changed places
        touched = {*state.labels[list(step)].tolist(), *step.values()}
        rise = after.cost - state.cost + wrong[list(touched)].sum()
        steps.append((float(rise), changed))
    return steps
