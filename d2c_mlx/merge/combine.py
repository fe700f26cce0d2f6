"""Merges in core space: TIES and TSV-M, and what methods like them are made of.

Updates are `(T, q, p)`, or in factors as `CoreSpace.parts`, so that memory does not grow with T
dense updates; a result is `(q, p)`. The bases are orthonormal, so TSV-M gives exactly what the
dense dW would. Entries, which TIES works on, depend on the basis: in its paper it is the model's;
here it is the QR of the stacked factors, adapters in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.adapters.core_space import CoreSpace

__all__ = [
    "ZERO",
    "Triplets",
    "elected_signs",
    "leading_triplets",
    "n_updates",
    "norm_bound",
    "reassemble",
    "ties",
    "tsv",
]

# Singular vectors as columns and values: `(q, k), (k,), (p, k)`.
Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
# Rounding errors of float32: singular values as a share of the whole (their vectors are arbitrary),
# singular values of unit vectors that are parallel, and sums as a share of the largest entry.
ZERO, _PARALLEL, _CANCELLED = 1e-5, 1e-4, 1e-6


def ties(updates: np.ndarray, density: float) -> np.ndarray:
    """Trim every update, elect a sign per entry, and average the entries that agree with it.

    Use it when tasks pull in opposite directions. Of every update the largest entries are kept by
    magnitude, at least one; equal ones are all kept. Equal updates merge to the trimmed update, at
    density 1 to themselves.

    Args:
        updates: `(T, q, p)`.
        density: share of entries kept.

    Returns:
        `(q, p)`.

    Source: TIES-Merging, https://arxiv.org/abs/2306.01708, which trims over all modules at once; on
    core entries as in https://arxiv.org/abs/2509.17786.
    """
    flat = np.abs(updates).reshape(len(updates), -1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = np.partition(flat, -keep, axis=1)[:, -keep]
    trimmed = np.where(np.abs(updates) >= threshold[:, None, None], updates, 0)
    signs = elected_signs(trimmed)
    agree = (np.sign(trimmed) == signs) & (signs != 0)
    count = np.maximum(agree.sum(axis=0), 1).astype(trimmed.dtype)
    return np.where(agree, trimmed, 0).sum(axis=0) / count


def elected_signs(updates: np.ndarray) -> np.ndarray:
    """`(q, p)` signs of the sums over the updates; 0 where they cancel up to rounding."""
    total = updates.sum(axis=0)
    return np.where(np.abs(total) > _CANCELLED * np.abs(updates).max(), np.sign(total), 0)


def tsv(space: CoreSpace, rank: int) -> np.ndarray:
    """Add up the leading `rank / T` singular triplets of every task, with interference removed.

    Use it for many tasks with steep spectra. The left and right vectors of all tasks are replaced
    by their nearest orthonormal ones. Tasks are added up: near-orthogonal ones keep their size, and
    a scale may follow. T counts the tasks that have the module. Where `rank / T` is no integer it
    is rounded up, and the caller's truncation to `rank` decides. Equal updates merge to their best
    approximation of rank `rank / T`.

    Args:
        space: the T updates.
        rank: rank that the merge will be truncated to.

    Returns:
        `(q, p)`.

    Source: Task Singular Vectors, https://arxiv.org/abs/2412.00081.
    """
    per_task = -(-rank // n_updates(space))
    triplets = [
        leading_triplets(left, right, norm_bound(left, right), per_task)
        for left, right in space.parts
    ]
    return reassemble(triplets, space)


def n_updates(space: CoreSpace) -> int:
    """T without the tasks that lack the module, which need no direction; at least 1."""
    return max(1, sum(rank > 0 for rank in space.ranks))


def norm_bound(left: np.ndarray, right: np.ndarray) -> float:
    """An upper bound on the norm of `left @ right.T`, and so on its rounding errors."""
    return float(np.linalg.norm(left) * np.linalg.norm(right))


def leading_triplets(left: np.ndarray, right: np.ndarray, size: float, n: int) -> Triplets:
    """At most n leading singular triplets of `left @ right.T`, without those that are rounding.

    Args:
        left: `(q, r)`.
        right: `(p, r)`.
        size: norm that rounding errors are relative to, see `norm_bound`.
        n: most triplets.

    Returns:
        `(q, k), (k,), (p, k)`.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    k = min(n, int((s > ZERO * size).sum()))
    return q_left @ u[:, :k], s[:k], q_right @ vt[:k].T


def reassemble(parts: Sequence[Triplets], space: CoreSpace) -> np.ndarray:
    """`U S V^T` of all triplets, `(q, p)`, with U and V made orthonormal (their polar factors)."""
    u, s, v = (np.concatenate(columns, axis=-1) for columns in zip(*parts))
    if not len(s):
        return np.zeros((len(space.r_b), len(space.r_a)), s.dtype)
    nearest = []
    for columns in (u, v):
        left, values, right = np.linalg.svd(columns, full_matrices=False)
        k = int((values > _PARALLEL).sum())  # no direction that only rounding errors span
        nearest.append(left[:, :k] @ right[:k])
    return (nearest[0] * s) @ nearest[1].T
