"""D2C, https://arxiv.org/abs/2601.17441: the paper's loop, and moves from the best start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from d2c_mlx.cluster.local_search import Costs, improve, predicted_partition
from d2c_mlx.cluster.partition import Clustering, Problem, canonical, kmeans, refill

__all__ = ["INITS", "d2c"]

# A run offers the last two. "adapters" is no option of a run, because the table is the better start
# of the two. It is here for the experiment that repeats the paper, whose loop moves from it alone:
# in a partition every task prefers the merge that has its own adapter.
INITS = ("adapters", "kmeans", "table")
# The paper's loop ends after this many rounds without a new best.
_STALE_ROUNDS = 2
# Typical number of evaluations until the scale of a merge is found.
_TUNINGS = 4


def _farthest_seeds(problem: Problem, n_clusters: int, rng: np.random.Generator) -> list[int]:
    """Choose a random adapter, then always the one farthest from those chosen, in mutual regret."""
    distance = problem.regrets + problem.regrets.T
    seeds = [int(rng.integers(problem.n))]
    while len(seeds) < n_clusters:
        nearest = distance[:, seeds].min(axis=1)
        nearest[seeds] = -np.inf
        seeds.append(int(np.argmax(nearest)))
    return seeds


def _start(problem: Problem, n_clusters: int, init: str, rng: np.random.Generator) -> np.ndarray:
    """The partition of round 0; for "adapters", each task joins the seed that serves it best."""
    if init == "kmeans":
        return np.array(kmeans(problem.features, n_clusters, int(rng.integers(1 << 31))).labels)
    if init == "table":
        return np.array(predicted_partition(problem, n_clusters))
    seeds = _farthest_seeds(problem, n_clusters, rng)
    scores = problem.regrets[:, seeds]
    labels = scores.argmin(axis=1)
    served = scores[np.arange(problem.n), labels]
    return refill(labels, n_clusters, served)


def _scores(problem: Problem, labels: np.ndarray, n_clusters: int, eps: float) -> np.ndarray:
    """`(n, k)` normalised regret of every task under the merge of every cluster.

    Infinity stands for a regret that is proven to be no reason to move: it is at most `eps` below
    the regret in the task's own cluster.
    """
    inside = [np.flatnonzero(labels == k).tolist() for k in range(n_clusters)]
    outside = [np.flatnonzero(labels != k).tolist() for k in range(n_clusters)]
    merges = [problem.merge(tuple(members)) for members in inside]
    regrets = np.full((problem.n, n_clusters), np.inf)
    for k, own in enumerate(problem.measure(list(zip(merges, inside)))):
        regrets[inside[k], k] = own
    # Slightly higher, so that rounding never rules out a task that would move.
    limits = regrets.min(axis=1) - eps + 1e-9
    others = problem.measure(list(zip(merges, outside)), [limits[tasks] for tasks in outside])
    for k, other in enumerate(others):
        regrets[outside[k], k] = other
    return regrets


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
        scores = _scores(problem, labels, n_clusters, eps)
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
    search: str = "paper",
    init: Sequence[str] = ("table", "kmeans"),
    rounds: int = 10,
    restarts: int = 1,
    seed: int = 0,
    eps: float = 1e-3,
    patience: int = 10,
) -> Clustering:
    """Choose which adapters to merge by the losses of merges on calibration rows.

    Use search "moves" to compress; use "paper" to repeat the paper's experiment. `kmeans` in
    `partition.py` needs no losses, and is the baseline.

    Args:
        problem: adapters, and the callables that merge and measure them.
        n_clusters: K; at N or more every adapter stays alone.
        search: "paper" moves each task to the cluster whose merge serves it best, merges again and
            repeats, from every start. "moves" tries single moves and swaps, each judged by the
            merges that it changes, from the best start.
        init: starts to try: "table" (`local_search.predicted_partition`), "kmeans", "adapters" (K
            single adapters as the first merges, farthest first; it needs the whole loss table).
            The lowest normalised regret wins; ties go to the first.
        rounds: most reassignments from one start of the paper's loop.
        restarts: draws of the start "adapters"; the other starts, and K = 1, need only one.
        seed: seed of all random choices.
        eps: a task, or a step of "moves", must lower the regret by more than this.
        patience: "moves" ends after this many failed steps in a row.

    Returns:
        The best partition found, with the history of the run that found it.

    Source: https://arxiv.org/abs/2601.17441.
    """
    if n_clusters >= problem.n:
        return Clustering("d2c", tuple(range(problem.n)), 0.0, seed=seed, stopped="converged")
    found: list[Clustering] = []
    starts: list[dict[str, Any]] = []
    costs = Costs(problem)
    draws = [
        (kind, restart) for kind in init for restart in range(restarts if kind == "adapters" else 1)
    ]
    if n_clusters == 1:
        draws = draws[:1]
    for place, (kind, restart) in enumerate(draws):
        _foresee(problem, n_clusters, search, patience, len(draws) - place)
        rng = np.random.default_rng([seed, restart, INITS.index(kind)])
        labels = _start(problem, n_clusters, kind, rng)
        if search == "paper":
            best, objective, history, stopped = _refine(problem, labels, n_clusters, rounds, eps)
        else:
            best, objective = canonical(labels), costs.objective(labels)
            history, stopped = [{"objective": objective, "labels": list(best)}], "compared"
        found.append(Clustering("d2c", best, objective, history, seed, kind, stopped))
        starts.append(
            {"init": kind, "restart": restart, "objective": objective, "stopped": stopped}
        )
    # Ties, up to rounding, go to the first.
    lowest = min(start["objective"] for start in starts)
    place = next(i for i, start in enumerate(starts) if start["objective"] <= lowest + 1e-12)
    winner = found[place]
    if search == "moves":
        history, stopped = improve(costs, winner.labels, eps, patience)
        winner = replace(
            winner,
            labels=tuple(history[-1]["labels"]),
            objective=history[-1]["objective"],
            history=history,
            stopped=stopped,
        )
    problem.foresee([])
    return replace(winner, starts=starts)


def _foresee(problem: Problem, n_clusters: int, search: str, patience: int, n_starts: int) -> None:
    """Estimate the work of the starts that are left, and of the moves from the best of them."""
    if search == "paper":
        # All tasks under every merge; early stopping saves about what later rounds add.
        times = n_starts * (_TUNINGS + n_clusters)
    else:
        times = n_starts * _TUNINGS + patience // n_clusters
    problem.foresee([tuple(range(problem.n))] * times)
