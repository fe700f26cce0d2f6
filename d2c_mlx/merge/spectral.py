"""TSV-M, a merge of singular vectors, and what merges like it are made of.

A result is `(q, p)` in core space. The bases are orthonormal, so it is exactly what the dense dW
would give. Tasks are added up: T near-orthogonal ones keep their size, and a scale may follow.
Tasks stay in factors, so memory does not grow with T dense updates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.adapters.core_space import CoreSpace

__all__ = ["ZERO", "Triplets", "leading_triplets", "n_updates", "norm_bound", "reassemble", "tsv"]

# Singular vectors as columns and values: `(q, k), (k,), (p, k)`.
Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
# Rounding errors of float32: singular values as a share of the whole (their vectors are arbitrary),
# and singular values of unit vectors that are parallel.
ZERO, _PARALLEL = 1e-5, 1e-4


def tsv(space: CoreSpace, rank: int) -> np.ndarray:
    """Add up the leading `rank / T` singular triplets of every task, with interference removed.

    Use it for many tasks with steep spectra. The left and right vectors of all tasks are replaced
    by their nearest orthonormal ones. T counts the tasks that have the module. Where `rank / T` is
    no integer it is rounded up, and the caller's truncation to `rank` decides. Equal updates merge
    to their best approximation of rank `rank / T`.

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
    """`U S V^T` of all triplets, `(q, p)`, with U and V made orthonormal."""
    u, s, v = (np.concatenate(columns, axis=-1) for columns in zip(*parts))
    if not len(s):
        return np.zeros((len(space.r_b), len(space.r_a)), s.dtype)
    return (_nearest_orthonormal(u) * s) @ _nearest_orthonormal(v).T


def _nearest_orthonormal(columns: np.ndarray) -> np.ndarray:
    """The polar factor of `(q, k)`, without directions that only rounding errors span."""
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    k = int((s > _PARALLEL).sum())
    return u[:, :k] @ vt[:k]
