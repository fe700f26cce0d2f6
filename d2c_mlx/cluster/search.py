"""The search by estimates: of thousands of partitions it measures the few that look best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from d2c_mlx.cluster.estimates import MergeEstimates
from d2c_mlx.cluster.partition import (
    Clusters,
    Labels,
    Members,
    Problem,
    canonical,
    groups_of,
    kmeans,
)

__all__ = [
    "MOST_FAILED", "MOST_STEPS", "State", "cluster_by_weights", "estimated_partition", "improved",
    "search_by_estimates",
]  # fmt: skip

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
# Swaps whose exact gain is computed where no single move helps, the most promising ones.
_SWAPS = 64
_ROUNDING = 1e-9


class State:
    """A partition, with the sums that estimates of its moves need."""

    def __init__(self, estimates: MergeEstimates, labels: np.ndarray) -> None:
        self.estimates, self.labels = estimates, labels
        self.tasks = np.arange(estimates.n)
        self._member = np.eye(labels.max() + 1)[labels]
        self._pairs = estimates.pair @ self._member
        self._size = self._member.sum(axis=0).astype(int)
        self._own = self._pairs[self.tasks, labels]
        regrets = estimates.regrets(self.tasks, self._size[labels], self._own)
        self.costs = self._member.T @ regrets
        self.cost = float(self.costs.sum())

    def rises(self) -> np.ndarray:
        """`(k, k)` rise of the cost if two clusters become one; infinity but below the diagonal."""
        size = self._size[self.labels][:, None] + self._size
        # [i, k]: regret of i if its cluster and k became one; by cluster, one side of the union.
        joined = self.estimates.regrets(
            self.tasks[:, None],
            np.minimum(size, self.estimates.n),
            self._own[:, None] + self._pairs,
        )
        half = self._member.T @ joined
        rise = half + half.T - self.costs[:, None] - self.costs
        rise[np.triu_indices(len(self._size))] = np.inf
        return rise

    def after(self, step: Mapping[int, int]) -> State:
        """The partition after some tasks, the keys, went to other clusters, the values."""
        labels = self.labels.copy()
        labels[list(step)] = list(step.values())
        return State(self.estimates, labels)

    def next(self) -> State | None:
        """The partition after the best move, or the best swap if no move helps; None if neither."""
        gains = self.gains()
        i, k = np.unravel_index(np.argmin(gains), gains.shape)
        steps = [self._together(gains), {int(i): int(k)}]
        if gains[i, k] > -_ROUNDING:
            steps = self.promising_swaps(gains)
        for step in steps:
            after = self.after(step)
            if after.cost < self.cost - _ROUNDING:
                return after
        return None

    def gains(self) -> np.ndarray:
        """`(n, k)` change of the cost if task i moves to cluster k."""
        tasks, labels, pair = self.tasks, self.labels, self.estimates.pair
        size = self._size[labels]
        regrets = self.estimates.regrets
        # [m, i]: regret of m when i joins, or leaves, its cluster.
        with_i = regrets(tasks[:, None], size[:, None] + 1, self._own[:, None] + pair)
        joining = (self._member.T @ with_i).T + regrets(tasks[:, None], self._size + 1, self._pairs)
        together = self._member @ self._member.T - np.eye(len(tasks))
        without = regrets(
            tasks[:, None], np.maximum(size - 1, 1)[:, None], self._own[:, None] - pair
        )
        leaving = (together * without).sum(axis=0)
        gains = joining - self.costs + (leaving - self.costs[labels])[:, None]
        gains[tasks, labels] = np.inf
        gains[size == 1] = np.inf  # no cluster becomes empty
        return gains

    def _together(self, gains: np.ndarray) -> dict[int, int]:
        """Moves that help and share no cluster, the largest gain first."""
        best = gains.argmin(axis=1)
        used: set[int] = set()
        steps = {}
        for i in np.argsort(gains[self.tasks, best]):
            both = {int(self.labels[i]), int(best[i])}
            if gains[i, best[i]] < -_ROUNDING and not both & used:
                used |= both
                steps[int(i)] = int(best[i])
        return steps

    def promising_swaps(self, gains: np.ndarray) -> list[dict[int, int]]:
        """Swaps, the largest sum of both moves' gains first."""
        both = np.where(np.isfinite(gains), gains, 0.0)[:, self.labels]
        both = both + both.T
        both[self.labels[:, None] == self.labels] = np.inf
        both[np.triu_indices(len(both))] = np.inf
        order = np.argsort(both, axis=None)[:_SWAPS]
        return [
            {int(i): int(self.labels[j]), int(j): int(self.labels[i])}
            for i, j in zip(*np.unravel_index(order, both.shape))
            if np.isfinite(both[i, j])
        ]


def improved(estimates: MergeEstimates, labels: Sequence[int] | np.ndarray) -> Labels:
    """Take the best move, or swap where no move helps, while one lowers the estimated regret.

    Args:
        estimates: estimated regrets.
        labels: `(n,)` the partition to start from; its clusters are numbered from 0, none is empty.

    Returns:
        The cluster of every adapter, numbered by first appearance; as many clusters as before.
    """
    state = State(estimates, np.array(labels))
    while after := state.next():
        state = after
    return canonical(state.labels)


def estimated_partition(estimates: MergeEstimates, n_clusters: int) -> Labels:
    """Find the partition with the least estimated regret, from single adapters upwards.

    Clusters whose union raises the cost least become one, several pairs at a time, until
    `n_clusters` are left; then moves and swaps follow, see `improved`. Memory and the time of a
    step grow with N squared.

    Args:
        estimates: estimated regrets.
        n_clusters: K, at most N.

    Returns:
        The cluster of every adapter, numbered by first appearance.
    """
    state = State(estimates, np.arange(estimates.n))
    while (k := len(state.costs)) > n_clusters:
        labels, rises = state.labels.copy(), state.rises()
        most = max(1, (k - n_clusters) // 4)
        used: set[int] = set()
        order = np.argsort(rises, axis=None, kind="stable")[: 8 * most]
        for b, a in zip(*np.unravel_index(order, rises.shape)):
            # Pairs (a, b), a < b, that share no cluster, the least rise first.
            if len(used) < 2 * most and not {int(a), int(b)} & used:
                used |= {int(a), int(b)}
                labels[labels == b] = a
        state = State(estimates, np.unique(labels, return_inverse=True)[1])
    return improved(estimates, state.labels)


def cluster_by_weights(problem: Problem, n_clusters: int) -> Clusters:
    """Cluster where nothing can be measured: the partition that is estimated to be best.

    Args:
        problem: with a fading that is typical of adapters, since these were not measured.
        n_clusters: K, at most N.
    """
    labels = estimated_partition(MergeEstimates(problem.fading, problem.similarity), n_clusters)
    return Clusters("d2c", labels, init="weights", stopped="nothing to measure on")


def search_by_estimates(
    problem: Problem, n_clusters: int, seed: int, eps: float = 1e-3
) -> Clusters:
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
    measured = _Measured(problem)
    history = []
    best: Labels = ()
    lowest, failed = np.inf, 0
    # K-Means puts alike adapters together, of which the estimates know least.
    proposal = kmeans(problem.features, n_clusters, seed).labels
    while True:
        regret = measured.measure(groups_of(proposal)) / problem.n
        history.append({"regret": regret, "labels": list(proposal)})
        failed += 1
        if regret < lowest - eps:
            best, lowest, failed = proposal, regret, 0
        if failed > MOST_FAILED:
            break
        others = {improved(measured.estimates, labels) for labels in (best, proposal)}
        others.add(estimated_partition(measured.estimates, n_clusters))
        costs = {labels: measured.cost(groups_of(labels)) / problem.n for labels in sorted(others)}
        proposal = min(costs, key=costs.__getitem__)
        if costs[proposal] >= lowest - eps:
            break
    while better := measured.step(best, eps):
        best, lowest = better, measured.cost(groups_of(better)) / problem.n
        history.append({"regret": lowest, "labels": list(best)})
    return Clusters("d2c", best, lowest, history, seed, "estimates", "converged")


class _Measured:
    """Measured regrets of clusters, and what they teach."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.estimates = MergeEstimates(problem.fading, problem.similarity)
        self._regrets: dict[Members, np.ndarray] = {}  # of the members' tasks

    def measure(self, clusters: Sequence[Members]) -> float:
        """The cost of some clusters: the summed regret of their tasks.

        Only what was not measured before is measured, the largest first: its scale is that of all.
        """
        new = [c for c in clusters if c not in self._regrets and len(c) > 1]
        for members in (new := sorted(new, key=len, reverse=True)):
            merged = self._problem.merge(members, next(iter(self._regrets), ()))
            (self._regrets[members],) = self._problem.measure([(merged, members)])
        if new:
            self.estimates.learn({members: self._regrets[members] for members in new})
        return self.cost(clusters)

    def cost(self, clusters: Iterable[Members]) -> float:
        """The cost of some clusters, measured where it was, else estimated."""
        return sum(float(self._of(members).sum()) for members in clusters)

    def _of(self, members: Members) -> np.ndarray:
        regrets = self._regrets.get(members)
        return self.estimates.of(members) if regrets is None else regrets

    def _by_task(self, clusters: Iterable[Members]) -> np.ndarray:
        clusters = list(clusters)
        order = np.argsort([i for members in clusters for i in members])
        return np.concatenate([self._of(members) for members in clusters])[order]

    def step(self, labels: Labels, eps: float) -> Labels | None:
        """The first move or swap that lowers the measured mean regret by more than `eps` and luck.

        The most promising are tried first; None once several did not.
        """
        tried: set[Labels] = set()
        least = eps * len(labels)
        for _ in range(min(MOST_STEPS, len(labels) // _TASKS_A_STEP)):
            steps = [step for step in self._promising(labels) if step[1] not in tried]
            if not steps:
                return None
            _, step = min(steps)
            tried.add(step)
            old, new = set(groups_of(labels)), set(groups_of(step))
            # A cluster hardly ever costs less than 0, so one is mostly enough to refuse a step.
            first, second = sorted(new - old, key=lambda c: self.cost([c]), reverse=True)
            most = self.cost(old - new) - least
            if self.measure([first]) >= most or self.measure([first, second]) >= most:
                continue
            gains = self._by_task(old - new) - self._by_task(new - old)
            if gains.sum() > _BEYOND_LUCK * gains.std(ddof=1) * np.sqrt(len(gains)):
                return step
        return None

    def _promising(self, labels: Labels) -> list[tuple[float, Labels]]:
        """Some moves and swaps: the change of the summed regret that is estimated, the partition.

        The estimates of today's clusters are corrected by what was measured; of the new ones they
        are not.
        """
        state = State(self.estimates, np.array(labels))
        error = state.costs - [self.cost([members]) for members in groups_of(labels)]
        gains = state.gains()
        order = np.argsort(gains + error[state.labels][:, None] + error, axis=None)[:_LOOKED_AT]
        best = zip(*np.unravel_index(order, gains.shape))
        moves = [{int(i): int(k)} for i, k in best if np.isfinite(gains[i, k])]
        steps = []
        for step in moves + state.promising_swaps(gains)[:_LOOKED_AT]:
            after = state.after(step)
            if (changed := canonical(after.labels)) == labels:
                continue  # two that are alone have changed places
            touched = {*state.labels[list(step)].tolist(), *step.values()}
            rise = after.cost - state.cost + error[list(touched)].sum()
            steps.append((float(rise), changed))
        return steps
