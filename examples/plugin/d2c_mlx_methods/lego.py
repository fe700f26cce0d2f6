"""LoRA-LEGO: an adapter as a set of rank-1 units, merged by clustering them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from d2c_mlx.adapters.core_space import Factors, to_core

__all__ = ["lego"]


def lego(factors: Sequence[Factors], rank: int, seed: int) -> Factors:
    """Cluster the rank-1 units `(a_j, b_j)` of all tasks; every centroid is a unit of the result.

    Use it for adapters from a common start, whose units correspond. Units are those of the stored
    factors, so the same dW in other factors merges differently. Distances in core space are those
    of the factors. Two reweightings are the paper's: a centroid takes the mean norm of its units,
    because averaging shrinks it, and the whole is scaled by sqrt(r / k), r the mean rank of the
    tasks and k the number of clusters. One step is not in the paper: a unit is first balanced to
    `|a_j| = |b_j|`, so that it does not matter which factor holds a scale. Equal adapters merge to
    themselves if `rank` is at least theirs.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`.
        rank: most clusters; there are fewer where fewer units differ.
        seed: seed of K-Means, below 2^32.

    Returns:
        `a (in, k)`, `b (k, out)`.

    Source: LoRA-LEGO, https://arxiv.org/abs/2409.16167.
    """
    space = to_core(factors)
    a, b = space.r_a.T.astype(np.float64), space.r_b.T.astype(np.float64)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    alive = (norm_a > 0) & (norm_b > 0)
    if not alive.any():
        return space.q_a[:, :1] * 0, space.q_b.T[:1] * 0
    balance = np.sqrt(norm_b[alive] / norm_a[alive])[:, None]
    units = np.concatenate([a[alive] * balance, b[alive] / balance], axis=1)
    k = min(rank, _n_distinct(units))
    # One thread gives the same sums in the same order on every run.
    with threadpool_limits(1):
        labels = KMeans(k, n_init=10, random_state=seed).fit(units).labels_
    n_tasks = len(np.unique(np.repeat(np.arange(len(space.ranks)), space.ranks)[alive]))
    merged = np.stack([_centroid(units[labels == k]) for k in np.unique(labels)])
    merged *= (len(units) / n_tasks / len(merged)) ** 0.25  # on both factors: sqrt(r / k) on dW
    left, right = np.split(merged.astype(space.q_a.dtype), [a.shape[1]], axis=1)
    return space.q_a @ left.T, right @ space.q_b.T


def _n_distinct(units: np.ndarray) -> int:
    """Count the units, `(R, p + q)`, that differ from all before them by more than rounding."""
    inner = units @ units.T
    squares = np.diagonal(inner)
    total = squares[:, None] + squares
    near = np.tril(total - 2 * inner <= 1e-10 * total, -1)
    return int((~near.any(axis=1)).sum())


def _centroid(units: np.ndarray) -> np.ndarray:
    mean = units.mean(axis=0)
    norm = np.linalg.norm(mean)
    return mean * (np.linalg.norm(units, axis=1).mean() / norm) if norm > 0 else mean
