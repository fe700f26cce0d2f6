"""The loop of D2C as the paper has it, https://arxiv.org/abs/2601.17441."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from d2c_mlx.cluster.partition import Clusters, Problem, canonical, groups_of, kmeans, refill

__all__ = ["INITS", "d2c"]

# In a partition every task prefers the merge that has its own adapter, so the loop moves nothing
# from K-Means; from single adapters it does.
INITS = ("adapters", "kmeans")
# The loop ends after this many rounds without a new best.
_STALE_ROUNDS = 2
# Regrets that differ by less are equal up to rounding.
_EQUAL = 1e-12


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
    best, lowest = None, np.inf
    for kind in init[: 1 if n_clusters == 1 else None]:
        rng = np.random.default_rng([seed, 0, INITS.index(kind)])
        labels = _start(problem, n_clusters, kind, rng)
        result, regret = _loop(problem, labels, rounds, eps)
        if best is None or regret < lowest - _EQUAL:
            best, lowest = replace(result, seed=seed, init=kind), regret
    assert best, "one start at least"
    return best


def _start(problem: Problem, n_clusters: int, init: str, rng: np.random.Generator) -> np.ndarray:
    """The partition of round 0: K-Means, or each task joins the best of K single adapters.

    The first of these is drawn; each further one is that of the task that those before serve worst.
    """
    if init == "kmeans":
        return np.array(kmeans(problem.features, n_clusters, int(rng.integers(1 << 31))).labels)
    chosen = [int(rng.integers(problem.n))]
    scores: list[np.ndarray] = []
    while True:
        scores += problem.measure([(problem.merge((chosen[-1],)), range(problem.n))])
        if len(chosen) == n_clusters:
            break
        served = np.min(scores, axis=0)
        served[chosen] = -np.inf
        chosen.append(int(np.argmax(served)))
    table = np.stack(scores, axis=1)
    return refill(table.argmin(axis=1), n_clusters, table.min(axis=1))


def _loop(problem: Problem, labels: np.ndarray, rounds: int, eps: float) -> tuple[Clusters, float]:
    """Run the paper's loop from one start: the best partition and its regret."""
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
    return Clusters("d2c", canonical(best), lowest, history, stopped=stopped), lowest
