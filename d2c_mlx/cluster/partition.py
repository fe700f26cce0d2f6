"""Partitions of adapters, the problem that clusterings solve, D2C's loop, and the baselines.

Clusterings see the model only through `Problem`: two callables (merge, measure) and a few arrays.
So a numpy table is enough to test them.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

Members = tuple[int, ...]
# The cluster of every adapter.
Labels = tuple[int, ...]

# Starts of the paper's loop. In a partition every task prefers the merge that has its own adapter,
# so the loop moves nothing from K-Means; from single adapters it does.
INITS = ("adapters", "kmeans")
# The loop ends after this many rounds without a new best.
_STALE_ROUNDS = 2
# Regrets that differ by less are equal up to rounding.
_EQUAL = 1e-12


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
        weights: `(n,)` what a task's regret counts, 1 on average.
    """

    merge: Callable[..., Any]
    measure: Callable[[Sequence[tuple[Any, Sequence[int]]]], Sequence[np.ndarray]]
    features: np.ndarray
    fading: Fading
    similarity: np.ndarray
    weights: np.ndarray

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
        regret: weighted mean regret on the calibration rows; None where it was not measured.
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
    """Weighted mean regret, each cluster merged at a scale of its own; 0 for one alone."""
    groups = [members for members in groups_of(labels) if len(members) > 1]
    regrets = problem.measure([(problem.merge(members), members) for members in groups])
    weights = [problem.weights[list(members)] for members in groups]
    return sum(float(x @ of_members) for x, of_members in zip(weights, regrets)) / problem.n


def refill(labels: np.ndarray, n_clusters: int, worst: np.ndarray) -> np.ndarray:
    """Move one task into every empty cluster: the worst-served one that is not alone in its own.

    `worst (n,)` says how badly each task is served now; ties go to the lowest index. Returns a copy
    of the labels `(n,)`; there are at most n clusters.
    """
    labels = labels.copy()
    for cluster in range(n_clusters):
        if not (labels == cluster).any():
            movable = np.bincount(labels, minlength=n_clusters)[labels] > 1
            labels[int(np.argmax(np.where(movable, worst, -np.inf)))] = cluster
    return labels


def random_partition(n: int, n_clusters: int, seed: int) -> Clusters:
    """Assign n adapters at random, uniformly, with no cluster empty; a baseline."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(n_clusters, size=n)
    labels = refill(labels, n_clusters, rng.random(n))
    return Clusters("random", canonical(labels), seed=seed)


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


def d2c(
    problem: Problem,
    n_clusters: int,
    *,
    init: Sequence[str] = INITS,
    rounds: int = 10,
    seed: int = 0,
    eps: float = 1e-3,
) -> Clusters:
    """Move each task to the cluster whose merge serves it best, merge again, and repeat.

    Use it to repeat the paper's experiment; `search_by_estimates` finds better clusters with fewer
    evaluations, and `kmeans` needs none.

    Args:
        problem: adapters, and the callables that merge and measure them.
        n_clusters: K; at N or more every adapter stays alone.
        init: starts to try: "adapters" (K single adapters as the first merges, the first of which
            is drawn) and "kmeans". The lowest normalised regret wins; ties go to the first.
        rounds: most reassignments from one start.
        seed: seed of all random choices.
        eps: a task must lower its regret by more than this to move.

    Returns:
        The best partition found, with the history of the run that found it.

    Source: https://arxiv.org/abs/2601.17441.
    """
    if n_clusters >= problem.n:
        return Clusters("d2c", tuple(range(problem.n)), 0.0, seed=seed, stopped="converged")
    results = []
    for kind in init[: 1 if n_clusters == 1 else None]:
        rng = np.random.default_rng([seed, 0, INITS.index(kind)])
        result = _loop(problem, _start(problem, n_clusters, kind, rng), rounds, eps)
        results.append(replace(result, seed=seed, init=kind))
    lowest = min(result.regret or 0.0 for result in results)
    return next(result for result in results if (result.regret or 0.0) < lowest + _EQUAL)


def _start(problem: Problem, n_clusters: int, init: str, rng: np.random.Generator) -> np.ndarray:
    """The partition of round 0: K-Means, or each task joins the best of K single adapters.

    The first of these is drawn; each further one is that of the task that those before serve worst.
    """
    if init == "kmeans":
        return np.array(kmeans(problem.features, n_clusters, int(rng.integers(1 << 31))).labels)
    chosen, scores = [int(rng.integers(problem.n))], list[np.ndarray]()
    while True:
        scores += problem.measure([(problem.merge((chosen[-1],)), range(problem.n))])
        served = np.min(scores, axis=0)
        if len(chosen) == n_clusters:
            return refill(np.argmin(scores, axis=0), n_clusters, served)
        served[chosen] = -np.inf
        chosen.append(int(np.argmax(served)))


def _loop(problem: Problem, labels: np.ndarray, rounds: int, eps: float) -> Clusters:
    """Run the paper's loop from one start: the best partition."""
    rows, n_clusters = np.arange(problem.n), labels.max() + 1
    best, lowest = labels, np.inf
    history, stale, stopped, seen = [], 0, "rounds", set()
    for _ in range(rounds + 1):
        seen.add(canonical(labels))
        # (n, k) regret of every task under the merge of every cluster.
        jobs = [(problem.merge(members), range(problem.n)) for members in groups_of(labels)]
        scores = np.stack(problem.measure(jobs), axis=1)
        served = scores[rows, labels]
        regret = float(served.mean())
        history.append({"regret": regret, "labels": list(canonical(labels))})
        # The regret may rise: a merge does not minimise its cluster's loss. Keep the best.
        if regret < lowest - _EQUAL:
            best, lowest, stale = labels, regret, 0
        elif (stale := stale + 1) >= _STALE_ROUNDS:
            stopped = "no progress"
            break
        wish = scores.argmin(axis=1)
        moved = np.where(scores[rows, wish] < served - eps, wish, labels)
        moved = refill(moved, n_clusters, scores[rows, moved])
        if canonical(moved) in seen:
            stopped = "converged" if canonical(moved) == canonical(labels) else "repeated"
            break
        labels = moved
    return Clusters("d2c", canonical(best), lowest, history, stopped=stopped)
