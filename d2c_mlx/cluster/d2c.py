"""The loop of D2C as the paper has it, https://arxiv.org/abs/2601.17441."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from d2c_mlx.cluster.partition import Clustering, Problem, canonical, kmeans, refill

__all__ = ["INITS", "d2c"]

# In a partition every task prefers the merge that has its own adapter, so the loop moves nothing
# from K-Means; from single adapters it does.
INITS = ("adapters", "kmeans")
# The loop ends after this many rounds without a new best.
_STALE_ROUNDS = 2


def _single_adapters(problem: Problem, n_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Each task joins one of K adapters, which serves it best.

    The first is drawn; each further one is that of the task that those before serve worst.
    """
    chosen = [int(rng.integers(problem.n))]
    everything = list(range(problem.n))
    scores: list[np.ndarray] = []
    while True:
        scores += problem.measure([(problem.merge((chosen[-1],)), everything)])
        if len(chosen) == n_clusters:
            break
        served = np.min(scores, axis=0)
        served[chosen] = -np.inf
        chosen.append(int(np.argmax(served)))
    table = np.stack(scores, axis=1)
    return refill(table.argmin(axis=1), n_clusters, table.min(axis=1))


def _start(problem: Problem, n_clusters: int, init: str, rng: np.random.Generator) -> np.ndarray:
    """The partition of round 0."""
    if init == "kmeans":
        return np.array(kmeans(problem.features, n_clusters, int(rng.integers(1 << 31))).labels)
    return _single_adapters(problem, n_clusters, rng)


def _scores(problem: Problem, labels: np.ndarray, n_clusters: int) -> np.ndarray:
    """`(n, k)` normalised regret of every task under the merge of every cluster."""
    clusters = [tuple(np.flatnonzero(labels == k).tolist()) for k in range(n_clusters)]
    everything = range(problem.n)
    jobs = [(problem.merge(members), everything) for members in clusters]
    return np.stack(problem.measure(jobs), axis=1)


def _refine(
    problem: Problem, labels: np.ndarray, n_clusters: int, rounds: int, eps: float
) -> tuple[tuple[int, ...], float, list[dict[str, Any]], str]:
    """Run the paper's loop from one start: `(best labels, objective, history, why it stopped)`."""
    rows = np.arange(problem.n)
    history: list[dict[str, Any]] = []
    best, best_objective, stale, stopped = canonical(labels), np.inf, 0, "rounds"
    seen = set()
    for _ in range(rounds + 1):
        seen.add(canonical(labels))
        scores = _scores(problem, labels, n_clusters)
        served = scores[rows, labels]
        objective = float(served.mean())
        history.append({"objective": objective, "labels": list(canonical(labels))})
        # The objective may rise: a merge does not minimise its cluster's loss. Keep the best.
        if objective < best_objective - 1e-12:
            best, best_objective, stale = canonical(labels), objective, 0
        else:
            stale += 1
            if stale >= _STALE_ROUNDS:
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
) -> Clustering:
    """Move each task to the cluster whose merge serves it best, merge again, and repeat.

    Use it to repeat the paper's experiment; `search_by_estimates` finds better clusters with fewer
    evaluations, and `kmeans` needs none.

    Args:
        problem: adapters, and the callables that merge and measure them.
        n_clusters: K; at N or more every adapter stays alone.
        init: starts to try: "adapters" (K single adapters as the first merges) and "kmeans". The
            lowest normalised regret wins; ties go to the first.
        rounds: most reassignments from one start.
        restarts: draws of the start "adapters"; K-Means, and K = 1, need only one.
        seed: seed of all random choices.
        eps: a task must lower its regret by more than this to move.

    Returns:
        The best partition found, with the history of the run that found it.

    Source: https://arxiv.org/abs/2601.17441.
    """
    if n_clusters >= problem.n:
        return Clustering("d2c", tuple(range(problem.n)), 0.0, seed=seed, stopped="converged")
    draws = [(kind, i) for kind in init for i in range(restarts if kind == "adapters" else 1)]
    if n_clusters == 1:
        draws = draws[:1]
    found: list[Clustering] = []
    starts: list[dict[str, Any]] = []
    for kind, restart in draws:
        rng = np.random.default_rng([seed, restart, INITS.index(kind)])
        labels = _start(problem, n_clusters, kind, rng)
        best, objective, history, stopped = _refine(problem, labels, n_clusters, rounds, eps)
        found.append(Clustering("d2c", best, objective, history, seed, kind, stopped))
        starts.append(
            {"init": kind, "restart": restart, "objective": objective, "stopped": stopped}
        )
    # Ties, up to rounding, go to the first.
    lowest = min(start["objective"] for start in starts)
    place = next(i for i, start in enumerate(starts) if start["objective"] <= lowest + 1e-12)
    return replace(found[place], starts=starts)
