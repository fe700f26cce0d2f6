"""Partitions of adapters, what may be asked about them, and the baselines.

Clusterings are written against `Problem`: two callables (merge, losses) and a few numbers, so that
a numpy table is enough to test them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

__all__ = [
    "LEAST_GAIN",
    "Clustering",
    "Problem",
    "canonical",
    "kmeans",
    "merge_all",
    "random_partition",
    "refill",
]

# Nats; a smaller gain is not divided by.
LEAST_GAIN = 0.05

Members = tuple[int, ...]


class Merge(Protocol):
    """Merges of adapters."""

    def __call__(self, members: Members, like: Members = ()) -> Any:  # noqa: ANN401  opaque
        """An opaque merge.

        Args:
            members: what is merged.
            like: members of another merge whose scale is taken; none: the scale is tuned.
        """


class Losses(Protocol):
    """Probe losses of merges."""

    def __call__(
        self,
        jobs: Sequence[tuple[Any, Sequence[int]]],
        limits: Sequence[np.ndarray] | None = None,
    ) -> Sequence[np.ndarray]:
        """For each (merge, tasks) `(n_tasks,)`; infinity may stand for one above its limit."""


def _unseen(merges: Sequence[Members]) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Problem:
    """N tasks, one adapter each, and what can be asked about merges of them.

    Attributes:
        base: `(n,)` probe loss of every task under the bare base model.
        table: `(n, n)` probe loss of task i under adapter j, or what is expected of it.
        merge: makes the merges.
        losses: list of (merge, tasks) -> for each the probe losses.
        features: `(n, d)` one row per adapter, for K-Means.
        foresee: is told of merges whose members are about to be asked for, in place of those it
            was told of before.
    """

    base: np.ndarray
    table: np.ndarray
    merge: Merge
    losses: Losses
    features: np.ndarray
    foresee: Callable[[Sequence[Members]], None] = _unseen

    @property
    def n(self) -> int:
        """Number of tasks."""
        return len(self.base)

    @property
    def gain(self) -> np.ndarray:
        """`(n,)` what a task's own adapter gains over the base model, at least `LEAST_GAIN`.

        The floor: an adapter that hardly helps must not outvote the others.
        """
        return np.maximum(self.base - np.diagonal(self.table), LEAST_GAIN)

    @property
    def harm(self) -> np.ndarray:
        """`(n, n)` regret of task i under adapter j; a merge holds only a part of a harmful one."""
        return np.clip(self.regret(self.table), -1, 2)

    def regret(self, losses: np.ndarray, tasks: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Normalised regret: 0 at the task's own adapter, 1 at the base model.

        Losses of different tasks are not comparable, their regrets are.

        Args:
            losses: `(n_tasks,)` or `(n_tasks, k)`.
            tasks: which tasks the rows are.
        """
        wide = (slice(None),) + (None,) * (losses.ndim - 1)
        return (losses - np.diagonal(self.table)[tasks][wide]) / self.gain[tasks][wide]


@dataclass(frozen=True)
class Clustering:
    """A partition of N adapters into clusters.

    Attributes:
        method: `d2c`, `kmeans`, `random` or `merge-all`.
        labels: cluster of every adapter; clusters are numbered by first appearance.
        objective: mean normalised regret on the probes, None where it was not measured.
        history: objective and labels of every round that was measured.
        seed: of the random choices.
        init: how the best run of D2C started.
        stopped: why it ended: converged, repeated, no progress, rounds, patience.
        starts: of D2C, every start that was tried: init, restart, objective, stopped.
    """

    method: str
    labels: tuple[int, ...]
    objective: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    init: str | None = None
    stopped: str | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def n_clusters(self) -> int:
        """Number of clusters; none is empty."""
        return max(self.labels) + 1

    def members(self, cluster: int) -> Members:
        """Indices of the adapters in `cluster`."""
        return tuple(i for i, label in enumerate(self.labels) if label == cluster)

    @property
    def groups(self) -> list[Members]:
        """Members of every cluster."""
        return [self.members(k) for k in range(self.n_clusters)]


def canonical(labels: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    """The same partition with clusters numbered by first appearance."""
    number: dict[int, int] = {}
    return tuple(number.setdefault(int(label), len(number)) for label in labels)


def refill(labels: np.ndarray, n_clusters: int, worst: np.ndarray) -> np.ndarray:
    """Give every empty cluster one task: the worst-served that does not live alone.

    Args:
        labels: `(n,)`.
        n_clusters: at most n.
        worst: `(n,)` how badly each task is served now; ties go to the lowest index.
    """
    labels = labels.copy()
    for cluster in range(n_clusters):
        if (labels == cluster).any():
            continue
        sizes = np.bincount(labels, minlength=n_clusters)
        movable = sizes[labels] > 1
        labels[int(np.argmax(np.where(movable, worst, -np.inf)))] = cluster
    return labels


def random_partition(n: int, n_clusters: int, seed: int) -> Clustering:
    """A uniform random assignment in which no cluster is empty."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_clusters, size=n)
    labels = refill(labels, n_clusters, rng.random(n))
    return Clustering("random", canonical(labels), seed=seed)


def merge_all(n: int) -> Clustering:
    """Everything in one cluster."""
    return Clustering("merge-all", (0,) * n)


def kmeans(features: np.ndarray, n_clusters: int, seed: int = 0) -> Clustering:
    """K-Means++ on rows of unit length (cosine), the baseline of the paper and of MBC.

    Source: https://arxiv.org/abs/2405.11157.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: the same sums in the same order on every run. Equal rows give fewer clusters
    # than asked, with a warning; `refill` below fills them.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = KMeans(n_clusters, n_init=10, random_state=seed).fit(features)
    distance = np.linalg.norm(features - fit.cluster_centers_[fit.labels_], axis=1)
    labels = refill(fit.labels_, n_clusters, distance)
    return Clustering("kmeans", canonical(labels), seed=seed)
