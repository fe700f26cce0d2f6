"""Partitions of adapters, the problem that clusterings solve, and the baselines.

Clusterings see the model only through `Problem`: two callables (merge, measure) and a few arrays.
So a numpy table is enough to test them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    "Clusters",
    "Fading",
    "Labels",
    "Members",
    "Problem",
    "canonical",
    "groups_of",
    "kmeans",
    "measured_regret",
    "merge_all",
    "random_partition",
    "refill",
]

Members = tuple[int, ...]
# The cluster of every adapter.
Labels = tuple[int, ...]


@dataclass(frozen=True)
class Fading:
    """Regrets of tasks under their own adapter, weakened.

    Attributes:
        strengths: `(s,)` factors on dW between 0 and 1, rising.
        regrets: `(n, s)` normalised regrets; they are 1 at strength 0 and 0 at strength 1.
    """

    strengths: Sequence[float]
    regrets: np.ndarray

    def at(self, strengths: np.ndarray) -> np.ndarray:
        """`(n, k)` regrets at `strengths (k,)`, interpolated without new bumps."""
        from scipy.interpolate import PchipInterpolator

        ones = np.ones((len(self.regrets), 1))
        regrets = np.hstack([ones, self.regrets, 0 * ones])
        return PchipInterpolator([0.0, *self.strengths, 1.0], regrets, axis=1)(strengths)


@dataclass(frozen=True)
class Problem:
    """N tasks with one adapter each, and the callables that merge and measure them.

    A regret is 0 at the task adapter and 1 at the base model. Losses of different tasks are not
    comparable; their regrets are.

    Attributes:
        merge: `merge(members, like=())` makes a merge of adapters, by their indices, that only
            `measure` looks into; `like` are the members of another merge whose scale is used, empty
            to tune the scale.
        measure: takes pairs of a merge and the indices of its tasks, and returns the `(n_tasks,)`
            regrets of each.
        features: `(n, d)` one row per adapter, for K-Means.
        fading: regrets under weakened task adapters, for estimates.
        similarity: `(n, n)` cosines of dW, for estimates.
    """

    merge: Callable[..., Any]
    measure: Callable[[Sequence[tuple[Any, Sequence[int]]]], Sequence[np.ndarray]]
    features: np.ndarray
    fading: Fading
    similarity: np.ndarray

    @property
    def n(self) -> int:
        """Number of tasks."""
        return len(self.features)


@dataclass(frozen=True)
class Clusters:
    """A partition of N adapters.

    Attributes:
        method: `d2c`, `kmeans`, `random` or `merge-all`.
        labels: cluster of every adapter; clusters are numbered by first appearance.
        regret: mean normalised regret on the calibration rows; None where it was not measured.
        history: regret and labels of every round that was measured.
        seed: seed of the random choices.
        init: start of the best run of D2C.
        stopped: why it ended: converged, repeated, no progress or rounds.
    """

    method: str
    labels: Labels
    regret: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    init: str | None = None
    stopped: str | None = None

    @property
    def groups(self) -> list[Members]:
        """Members of every cluster."""
        return groups_of(self.labels)


def canonical(labels: Sequence[int] | np.ndarray) -> Labels:
    """Number the clusters of a partition by first appearance, so that equal partitions compare."""
    number: dict[int, int] = {}
    return tuple(number.setdefault(int(label), len(number)) for label in labels)


def groups_of(labels: Sequence[int] | np.ndarray) -> list[Members]:
    """Members of every cluster."""
    where = np.asarray(labels)
    return [tuple(np.flatnonzero(where == k).tolist()) for k in np.unique(where)]


def measured_regret(problem: Problem, labels: Labels) -> float:
    """Mean regret of all tasks, each cluster merged at a scale of its own; 0 for one alone."""
    groups = [members for members in groups_of(labels) if len(members) > 1]
    regrets = problem.measure([(problem.merge(members), members) for members in groups])
    return sum(float(of_members.sum()) for of_members in regrets) / problem.n


def refill(labels: np.ndarray, n_clusters: int, worst: np.ndarray) -> np.ndarray:
    """Move one task into every empty cluster: the worst-served one that is not alone in its own.

    Args:
        labels: `(n,)` cluster of every task.
        n_clusters: number of clusters, at most n.
        worst: `(n,)` how badly each task is served now; ties go to the lowest index.

    Returns:
        `(n,)` labels without an empty cluster; a copy.
    """
    labels = labels.copy()
    for cluster in range(n_clusters):
        if not (labels == cluster).any():
            movable = np.bincount(labels, minlength=n_clusters)[labels] > 1
            labels[int(np.argmax(np.where(movable, worst, -np.inf)))] = cluster
    return labels


def random_partition(n: int, n_clusters: int, seed: int) -> Clusters:
    """Assign adapters at random, uniformly, with no cluster empty; a baseline.

    Args:
        n: number of adapters.
        n_clusters: number of clusters, at most n.
        seed: seed of the assignment.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_clusters, size=n)
    labels = refill(labels, n_clusters, rng.random(n))
    return Clusters("random", canonical(labels), seed=seed)


def merge_all(n: int) -> Clusters:
    """Put all adapters in one cluster; a baseline."""
    return Clusters("merge-all", (0,) * n)


def kmeans(features: np.ndarray, n_clusters: int, seed: int = 0) -> Clusters:
    """Cluster by K-Means++ on rows of unit length (cosine), the baseline of the paper.

    It looks at the adapters alone. `d2c` looks at the losses of merges.

    Args:
        features: `(n, d)` one row per adapter, see `core_space.svd_features`.
        n_clusters: number of clusters, none of them empty.
        seed: seed of the starts.

    Source: MBC, https://arxiv.org/abs/2405.11157.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread gives the same sums in the same order on every run. Equal rows give fewer clusters
    # than asked, with a warning; `refill` below fills them.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit = KMeans(n_clusters, n_init=10, random_state=seed).fit(features)
    distance = np.linalg.norm(features - fit.cluster_centers_[fit.labels_], axis=1)
    labels = refill(fit.labels_, n_clusters, distance)
    return Clusters("kmeans", canonical(labels), seed=seed)
