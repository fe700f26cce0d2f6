"""Estimated regrets of tasks under merges, corrected by the merges that are measured.

In a merge of m adapters a task's update keeps about the m-th part of its strength, and RegMean
keeps more of it on the task's own inputs. So the regret under a merge is foreseen by the regret
under the task adapter alone, weakened: one evaluation per strength, in place of one per pair of
adapters. On 24 real adapters and 122 (task, cluster) pairs that ranks the regrets under RegMean at
0.74 (Spearman; held-out rows rank them at 0.77); the size of the cluster alone ranks them at 0.45.
Cosines, output errors and the overlap of inputs add nothing to it. What is left, a factor of 1.9,
belongs to tasks and to pairs of them, and is learnt from what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from d2c_mlx.cluster.partition import Fading, Members

__all__ = ["STRENGTHS", "MergeEstimates"]

# Strengths at which a task adapter is measured, see `Fading`.
STRENGTHS = (0.2, 0.45)
# A merge of m adapters keeps `m ** -_KEPT` of each one's strength.
_KEPT = 0.5
# Regrets are compared as log(regret + _LEAST): below this they differ by luck.
_LEAST = 0.03
# Standard deviations of log regrets: of the level of all, which depends on the merge method, of a
# task, of a pair of tasks, and of a measurement.
_SD_LEVEL, _SD_TASK, _SD_PAIR, _SD_MEASURED = 1.0, 0.5, 0.25, 0.35
# A cosine of 1 with another member's update adds this to the log regret; its standard deviation.
_ALIKE, _SD_ALIKE = -0.7, 0.7
# Updates are copies where this power of their cosine is close to 1.
_COPIES = 8


class MergeEstimates:
    """Estimates the regret of every task in any cluster, and learns from measured clusters.

    The log of a regret is that of the weakened adapter plus a constant of the task and one for
    every other member, which starts at a multiple of their cosine: Bayesian linear regression.

    Attributes:
        n: number of tasks.
        task: `(n,)` constant of every task.
        pair: `(n, n)` what member j adds to task i; zeros on the diagonal.
    """

    def __init__(self, fading: Fading, similarity: np.ndarray) -> None:
        """Start from the weakened adapters.

        Args:
            fading: regrets under weakened task adapters.
            similarity: `(n, n)` cosines of the adapters' dW.
        """
        self.n = len(similarity)
        sizes = np.arange(1, self.n + 2)  # one more than there can be, for moves that cannot be
        # (n, size), as log; column m - 1 is for clusters of m.
        self._faded = np.log(np.maximum(fading.at(sizes**-_KEPT), -_LEAST / 2) + _LEAST)
        self._alike = similarity - np.diag(np.diag(similarity))
        # Copies of one adapter do each other no harm, whatever else is alike.
        self._copies = np.log1p(-(np.clip(self._alike, 0, 0.999) ** _COPIES))
        self.task, self.pair = np.zeros(self.n), _ALIKE * self._alike + self._copies
        self._seen: list[tuple[int, np.ndarray, float]] = []

    def regrets(self, tasks: np.ndarray, sizes: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Estimated regrets, elementwise.

        Args:
            tasks: indices of tasks.
            sizes: sizes of their clusters.
            pairs: sums of `pair` over the other members.
        """
        logs = self._faded[tasks, sizes - 1] + self.task[tasks] + pairs
        return np.where(sizes > 1, np.exp(np.minimum(logs, 1.0)) - _LEAST, 0.0)

    def of(self, members: Members) -> np.ndarray:
        """`(n_members,)` estimated regrets in one cluster."""
        tasks = np.array(members)
        pairs = self.pair[np.ix_(tasks, tasks)].sum(axis=1)
        return self.regrets(tasks, np.full(len(tasks), len(tasks)), pairs)

    def learn(self, measured: Mapping[Members, np.ndarray]) -> None:
        """Take in measured clusters, members -> their regrets `(n_members,)`, and fit anew."""
        for members, regrets in measured.items():
            logs = np.log(np.maximum(regrets, -_LEAST / 2) + _LEAST)
            for i, log in zip(members, logs):
                others = np.zeros(self.n)
                others[[j for j in members if j != i]] = 1
                self._seen.append((i, others, float(log) - self._faded[i, len(members) - 1]))
        if not self._seen:
            return
        tasks = np.array([i for i, _, _ in self._seen])
        others = np.array([row for _, row, _ in self._seen])
        alike = (others * self._alike[tasks]).sum(axis=1)
        copies = (others * self._copies[tasks]).sum(axis=1)
        y = np.array([log for _, _, log in self._seen]) - _ALIKE * alike - copies
        own = (tasks[:, None] == tasks) * (_SD_TASK**2 + _SD_PAIR**2 * (others @ others.T))
        shared = _SD_LEVEL**2 + _SD_ALIKE**2 * np.outer(alike, alike)
        weights = np.linalg.solve(own + shared + _SD_MEASURED**2 * np.eye(len(y)), y)
        each = np.eye(self.n)[tasks] * weights[:, None]
        self.task = _SD_LEVEL**2 * weights.sum() + _SD_TASK**2 * each.sum(axis=0)
        slope = _ALIKE + _SD_ALIKE**2 * float(alike @ weights)
        self.pair = slope * self._alike + self._copies + _SD_PAIR**2 * each.T @ others
