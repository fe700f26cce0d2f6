"""The partition that is estimated to be best, found among thousands; nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from d2c_mlx.cluster.merge_estimates import MergeEstimates
from d2c_mlx.cluster.partition import Clustering, Problem, canonical

__all__ = ["State", "cluster_by_weights", "estimated_partition", "improved"]

# Swaps whose exact gain is computed where no single move helps, the most promising ones.
_SWAPS = 64
_ROUNDING = 1e-9


def estimated_partition(estimates: MergeEstimates, n_clusters: int) -> tuple[int, ...]:
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
    while (k := state.n_clusters) > n_clusters:
        labels = state.labels.copy()
        for a, b in _disjoint(state.rises(), max(1, (k - n_clusters) // 4)):
            labels[labels == b] = a
        state = State(estimates, np.unique(labels, return_inverse=True)[1])
    return improved(estimates, state.labels)


def cluster_by_weights(problem: Problem, n_clusters: int) -> Clustering:
    """Cluster where nothing can be measured: the partition that is estimated to be best.

    Args:
        problem: with a fading that is typical of adapters, since these were not measured.
        n_clusters: K, at most N.
    """
    labels = estimated_partition(MergeEstimates(problem.fading, problem.similarity), n_clusters)
    return Clustering("d2c", labels, init="weights", stopped="nothing to measure on")


def improved(estimates: MergeEstimates, labels: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """Take the best move, or swap where no move helps, while one lowers the estimated regret.

    Args:
        estimates: estimated regrets.
        labels: `(n,)` the partition to start from; its clusters are numbered from 0, none is empty.

    Returns:
        The cluster of every adapter, numbered by first appearance; as many clusters as before.
    """
    state = State(estimates, np.array(labels))
    while state.step():
        pass
    return canonical(state.labels)


class State:
    """A partition, with the sums that its moves need."""

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

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return len(self._size)

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
        rise[np.triu_indices(self.n_clusters)] = np.inf
        return rise

    def after(self, step: Mapping[int, int]) -> State:
        """The partition after some tasks, the keys, went to other clusters, the values."""
        labels = self.labels.copy()
        labels[list(step)] = list(step.values())
        return State(self.estimates, labels)

    def step(self) -> bool:
        """Take the best step; False if none helps."""
        gains = self.gains()
        i, k = np.unravel_index(np.argmin(gains), gains.shape)
        steps = [self._together(gains), {int(i): int(k)}]
        if gains[i, k] > -_ROUNDING:
            steps = self.promising_swaps(gains)
        for step in steps:
            after = self.after(step)
            if after.cost < self.cost - _ROUNDING:
                vars(self).update(vars(after))
                return True
        return False

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
        found = []
        for i, j in zip(*np.unravel_index(order, both.shape)):
            if np.isfinite(both[i, j]):
                found.append({int(i): int(self.labels[j]), int(j): int(self.labels[i])})
        return found


def _disjoint(values: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Up to `most` pairs (a, b), a < b, of the lower triangle that share no index, least first."""
    found: list[tuple[int, int]] = []
    used: set[int] = set()
    order = np.argsort(values, axis=None, kind="stable")
    for b, a in zip(*np.unravel_index(order[: 8 * most], values.shape)):
        if len(found) < most and not {int(a), int(b)} & used:
            used |= {int(a), int(b)}
            found.append((int(a), int(b)))
    return found
