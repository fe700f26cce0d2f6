"""The search by estimates: it measures the few partitions that are estimated to be best."""

from __future__ import annotations

from collections.abc import Iterable
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
# Steps that may fail before a partition is taken as the best: one for so many tasks, among which
# there are more steps, and at most so many.
_TASKS_A_STEP, MOST_STEPS = 4, 8
# A step must help its tasks by so many standard errors of their mean: with few rows, single tasks
# win what others lose. Of 24 adapters with ten rows each, steps that held-out rows confirmed had
# 0.36 and more; of six with four rows, one that they did not confirm had 0.21.
_BEYOND_LUCK = 0.3
# Moves, and swaps, among which the most promising step is looked for.
_LOOKED_AT = 16


def search_by_estimates(
    problem: Problem, n_clusters: int, seed: int, eps: float = 1e-3
) -> Clustering:
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
        objective = found.measure(groups_of(proposal)) / problem.n
        history.append({"objective": objective, "labels": list(proposal)})
        failed += 1
        if objective < lowest - eps:
            best, lowest, failed = proposal, objective, 0
        if failed > MOST_FAILED:
            break
        others = {improved(found.estimates, one) for one in (best, proposal)}
        others.add(estimated_partition(found.estimates, n_clusters))
        costs = {one: found.cost(groups_of(one)) / problem.n for one in sorted(others)}
        proposal = min(costs, key=costs.__getitem__)
        if costs[proposal] >= lowest - eps:
            break
    while better := _measured_step(found, best, eps):
        best, lowest = better, found.cost(groups_of(better)) / problem.n
        history.append({"objective": lowest, "labels": list(best)})
    return Clustering("d2c", best, lowest, history, seed, "estimates", "converged")


class _Measured:
    """Measured regrets of clusters, and what they teach."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.estimates = MergeEstimates(problem.fading, problem.similarity)
        self._regrets: dict[Members, np.ndarray] = {}  # of the members' tasks

    def measure(self, clusters: Iterable[Members]) -> float:
        """The cost of some clusters: the summed regret of their tasks.

        Only what is not known is measured, the largest first: its scale is that of all.
        """
        clusters = list(clusters)
        found = {}
        for members in self._unknown(clusters):
            like = next(iter(self._regrets), ())
            merged = self._problem.merge(members, like)
            (found[members],) = self._problem.measure([(merged, members)])
            self._regrets[members] = found[members]
        if found:
            self.estimates.learn(found)
        return self.cost(clusters)

    def cost(self, clusters: Iterable[Members]) -> float:
        """The cost of some clusters, measured where it is known, else estimated."""
        return sum(float(self._regrets_of(one).sum()) for one in clusters)

    def regrets(self, clusters: Iterable[Members]) -> np.ndarray:
        """The regrets of the tasks of some clusters, by task, known or estimated."""
        clusters = list(clusters)
        order = np.argsort([i for members in clusters for i in members])
        return np.concatenate([self._regrets_of(one) for one in clusters])[order]

    def _unknown(self, clusters: Iterable[Members]) -> list[Members]:
        new = [one for one in clusters if one not in self._regrets and len(one) > 1]
        return sorted(new, key=len, reverse=True)

    def _regrets_of(self, members: Members) -> np.ndarray:
        known = self._regrets.get(members)
        return self.estimates.of(members) if known is None else known


def _measured_step(found: _Measured, labels: Labels, eps: float) -> Labels | None:
    """The first move or swap that lowers the measured mean regret by more than `eps` and luck.

    The most promising are tried first; None once several did not.
    """
    tried: set[Labels] = set()
    least = eps * len(labels)
    for _ in range(min(MOST_STEPS, len(labels) // _TASKS_A_STEP)):
        steps = [one for one in _promising(found, labels) if one[1] not in tried]
        if not steps:
            return None
        _, step = min(steps)
        tried.add(step)
        old, new = set(groups_of(labels)), set(groups_of(step))
        # A cluster hardly ever costs less than 0, so one is mostly enough to refuse a step.
        first, second = sorted(new - old, key=lambda one: found.cost([one]), reverse=True)
        most = found.cost(old - new) - least
        if found.measure([first]) >= most or found.measure([first, second]) >= most:
            continue
        gains = found.regrets(old - new) - found.regrets(new - old)
        if gains.sum() > _BEYOND_LUCK * gains.std(ddof=1) * np.sqrt(len(gains)):
            return step
    return None


def _promising(found: _Measured, labels: Labels) -> list[tuple[float, Labels]]:
    """Some moves and swaps: the change of the summed regret that is estimated, and the partition.

    The estimates of today's clusters are corrected by what was measured; of the new ones they are
    not.
    """
    state = State(found.estimates, np.array(labels))
    error = state.costs - [found.cost([one]) for one in groups_of(labels)]
    gains = state.gains()
    order = np.argsort(gains + error[state.labels][:, None] + error, axis=None)[:_LOOKED_AT]
    moves = [{int(i): int(k)} for i, k in zip(*np.unravel_index(order, gains.shape))
             if np.isfinite(gains[i, k])]  # fmt: skip
    steps = []
    for step in moves + state.promising_swaps(gains)[:_LOOKED_AT]:
        after = state.after(step)
        if (changed := canonical(after.labels)) == labels:
            continue  # two that are alone have changed places
        touched = {*state.labels[list(step)].tolist(), *step.values()}
        rise = after.cost - state.cost + error[list(touched)].sum()
        steps.append((float(rise), changed))
    return steps
