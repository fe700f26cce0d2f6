"""Which adapters to merge together: D2C and the baselines.

Everything here is written against `Problem`: two callables (merge, losses) and a few numbers, so
that a numpy table is enough to test it. D2C: https://arxiv.org/abs/2601.17441.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from d2c_mlx.adapter import Adapter

__all__ = [
    "INITS",
    "Clustering",
    "Problem",
    "canonical",
    "d2c",
    "kmeans",
    "merge_all",
    "random_partition",
    "refill",
    "similarity",
    "svd_features",
]

INITS = ("adapters", "kmeans", "random")
Members = tuple[int, ...]


class Losses(Protocol):
    """Probe losses of merges."""

    def __call__(
        self,
        jobs: Sequence[tuple[Any, Sequence[int]]],
        limits: Sequence[np.ndarray] | None = None,
    ) -> Sequence[np.ndarray]:
        """For each (merge, tasks) `(n_tasks,)`; infinity may stand for one above its limit."""


@dataclass(frozen=True)
class Problem:
    """N tasks, one adapter each, and what can be asked about merges of them.

    Attributes:
        base: `(n,)` probe loss of every task under the bare base model.
        table: `(n, n)` probe loss of task i under adapter j.
        merge: members -> an opaque merge.
        losses: list of (merge, tasks) -> for each the probe losses.
        features: `(n, d)` one row per adapter, for K-Means.
    """

    base: np.ndarray
    table: np.ndarray
    merge: Callable[[Members], Any]
    losses: Losses
    features: np.ndarray

    @property
    def n(self) -> int:
        """Number of tasks."""
        return len(self.base)

    @property
    def gain(self) -> np.ndarray:
        """`(n,)` what a task's own adapter gains over the base model, at least 0.05 nats.

        The floor: an adapter that hardly helps must not outvote the others.
        """
        return np.maximum(self.base - np.diagonal(self.table), 0.05)

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
        stopped: why it ended: converged, repeated, no progress, rounds.
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


def similarity(adapters: Sequence[Adapter]) -> np.ndarray:
    """`(n, n)` cosines of the adapters' dW over all modules.

    Computed from the factors, `<dW_i, dW_j> = sum((a_i^T a_j) * (b_i b_j^T))`, never forming dW.
    """
    n = len(adapters)
    gram = np.zeros((n, n))
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        here = [i for i in range(n) if path in adapters[i].modules]
        factors = [adapters[i].modules[path].factors() for i in here]
        a = np.concatenate([a for a, _ in factors], axis=1)
        b = np.concatenate([b for _, b in factors], axis=0)
        inner = (a.T @ a) * (b @ b.T)
        starts = np.cumsum([0, *(f.shape[1] for f, _ in factors)])[:-1]
        blocks = np.add.reduceat(np.add.reduceat(inner, starts, axis=0), starts, axis=1)
        gram[np.ix_(here, here)] += blocks
    norm = np.sqrt(np.maximum(np.diagonal(gram), 1e-30))
    return gram / np.outer(norm, norm)


def svd_features(adapters: Sequence[Adapter]) -> np.ndarray:
    """`(n, d)` SVD features of the flattened dW, each row of unit length.

    The SVD of the matrix whose rows are the normalised dW, taken from its Gram matrix. (MBC
    flattens A and B instead, which changes when both are rotated and dW is not.)
    """
    values, vectors = np.linalg.eigh(similarity(adapters))
    keep = values > 1e-6 * values.max()
    features = vectors[:, keep] * np.sqrt(values[keep])
    # An untrained adapter has dW = 0 and no direction: its row stays 0.
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _farthest_seeds(problem: Problem, n_clusters: int, rng: np.random.Generator) -> list[int]:
    """A random first adapter, then always the one worst served by, and serving, the others."""
    regret = problem.regret(problem.table)
    distance = regret + regret.T
    seeds = [int(rng.integers(problem.n))]
    while len(seeds) < n_clusters:
        nearest = distance[:, seeds].min(axis=1)
        nearest[seeds] = -np.inf
        seeds.append(int(np.argmax(nearest)))
    return seeds


def _start(problem: Problem, n_clusters: int, init: str, rng: np.random.Generator) -> np.ndarray:
    """The partition of round 0; from adapters, each task joins the seed that serves it best."""
    if init == "kmeans":
        return np.array(kmeans(problem.features, n_clusters, int(rng.integers(1 << 31))).labels)
    if init == "random":
        return np.array(random_partition(problem.n, n_clusters, int(rng.integers(1 << 31))).labels)
    seeds = _farthest_seeds(problem, n_clusters, rng)
    scores = problem.table[:, seeds]
    labels = scores.argmin(axis=1)
    served = problem.regret(scores)[np.arange(problem.n), labels]
    return refill(labels, n_clusters, served)


def _scores(problem: Problem, labels: np.ndarray, n_clusters: int, eps: float) -> np.ndarray:
    """`(n, k)` normalised regret of every task under the merge of every cluster.

    Infinity where it is proven to be no reason to move: at most `eps` below the task's own
    cluster's.
    """
    inside = [np.flatnonzero(labels == k).tolist() for k in range(n_clusters)]
    outside = [np.flatnonzero(labels != k).tolist() for k in range(n_clusters)]
    merges = [problem.merge(tuple(members)) for members in inside]
    losses = np.full((problem.n, n_clusters), np.inf)
    for k, own in enumerate(problem.losses(list(zip(merges, inside)))):
        losses[inside[k], k] = own
    # A hair above, so that rounding never rules out what would move.
    limits = losses.min(axis=1) - eps * problem.gain + 1e-9
    others = problem.losses(list(zip(merges, outside)), [limits[tasks] for tasks in outside])
    for k, other in enumerate(others):
        losses[outside[k], k] = other
    return problem.regret(losses)


def _refine(
    problem: Problem, labels: np.ndarray, n_clusters: int, rounds: int, eps: float, patience: int
) -> tuple[tuple[int, ...], float, list[dict[str, Any]], str]:
    """The loop of the paper from one start: `(best labels, objective, history, why it stopped)`."""
    rows = np.arange(problem.n)
    history: list[dict[str, Any]] = []
    best, best_objective, stale, stopped = canonical(labels), np.inf, 0, "rounds"
    seen = set()
    for _ in range(rounds + 1):
        seen.add(canonical(labels))
        scores = _scores(problem, labels, n_clusters, eps)
        served = scores[rows, labels]
        objective = float(served.mean())
        history.append({"objective": objective, "labels": list(canonical(labels))})
        # The objective may rise: a merge does not minimise its cluster's loss. Keep the best.
        if objective < best_objective - 1e-12:
            best, best_objective, stale = canonical(labels), objective, 0
        else:
            stale += 1
            if stale >= patience:
                stopped = "no progress"
                break
        wish = scores.argmin(axis=1)
        moved = np.where(scores[rows, wish] < served - eps, wish, labels)
        moved = refill(moved, n_clusters, scores[rows, moved])
        if canonical(moved) == canonical(labels):
            stopped = "converged"
            break
        if canonical(moved) in seen:
            stopped = "repeated"
            break
        labels = moved
    return best, best_objective, history, stopped


def d2c(
    problem: Problem,
    n_clusters: int,
    *,
    init: Sequence[str] = INITS,
    rounds: int = 10,
    restarts: int = 1,
    seed: int = 0,
    eps: float = 1e-3,
    patience: int = 2,
) -> Clustering:
    """D2C: move each task to the cluster whose merge serves it best, merge again, repeat.

    Args:
        problem: what can be asked.
        n_clusters: K; at N or more every adapter stays alone.
        init: starts to try: "adapters" (K single adapters as the first merges, farthest first),
            "kmeans", "random". The best by normalised regret wins, the first among equals.
        rounds: most reassignments of one start.
        restarts: draws per kind of start; K-Means and one cluster need only one.
        seed: of all random choices.
        eps: a task moves only if its regret falls by more.
        patience: stop after this many rounds without a new best.

    Returns:
        The best partition that was seen, with the history of the run that found it.
    """
    if n_clusters >= problem.n:
        return Clustering("d2c", tuple(range(problem.n)), 0.0, seed=seed, stopped="converged")
    found: Clustering | None = None
    starts: list[dict[str, Any]] = []
    for kind in init:
        for restart in range(1 if kind == "kmeans" or n_clusters == 1 else restarts):
            rng = np.random.default_rng([seed, restart, INITS.index(kind)])
            labels = _start(problem, n_clusters, kind, rng)
            best, objective, history, stopped = _refine(
                problem, labels, n_clusters, rounds, eps, patience
            )
            starts.append(
                {"init": kind, "restart": restart, "objective": objective, "stopped": stopped}
            )
            if found is None or objective < (found.objective or 0.0) - 1e-12:
                found = Clustering("d2c", best, objective, history, seed, kind, stopped, starts)
        if n_clusters == 1:
            break
    assert found is not None  # init is checked to be non-empty by RunConfig
    return found
