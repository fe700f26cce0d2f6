"""Merges of singular vectors: TSV-M, KnOTS, Iso-C and Iso-CTS.

A result is `(q, p)` in core space. The bases are orthonormal, so all but KnOTS give exactly what
the dense dW would. TSV-M and Iso add the tasks up as their papers do: T near-orthogonal tasks keep
their size, and a scale may follow. Tasks stay in factors, however many they are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from d2c_mlx.adapters.core_space import CoreSpace
from d2c_mlx.merge.entrywise import ties

__all__ = ["iso_c", "iso_cts", "knots", "tsv"]

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
# Singular values below this share of the whole are rounding of float32, and their vectors
# arbitrary. Among unit vectors the same holds of what tells parallel ones apart; and of entries
# beside the largest.
_ZERO, _PARALLEL, _ROUNDING = 1e-5, 1e-4, 1e-6


def tsv(space: CoreSpace, rank: int) -> np.ndarray:
    """The leading `rank / T` singular triplets of every task, with interference taken out.

    Left and right vectors of all tasks are replaced by their nearest orthonormal ones. T
    counts the tasks that have the module. Where `rank / T` is no integer it is rounded up, and the
    caller's truncation to `rank` decides.
    Equal updates merge to their best approximation of rank `rank / T`.

    Source: Task Singular Vectors, https://arxiv.org/abs/2412.00081.
    """
    per_task = -(-rank // _n_updates(space))
    triplets = [_low_rank_svd(*part, _size(*part), per_task) for part in space.parts]
    return _reassemble(triplets, space)


def iso_c(space: CoreSpace, rank: int) -> np.ndarray:
    """The sum of the updates with all singular values replaced by their mean.

    The mean is over the `rank` leading directions that are not zero: among equal singular values
    a later truncation would choose at random. So equal updates do not merge to themselves but to
    T times their update with a flat spectrum.

    Source: Iso-C, https://arxiv.org/abs/2502.04959.
    """
    return _reassemble([_svd_of_sum(space, rank)], space, flat=True)


def iso_cts(space: CoreSpace, rank: int, common: float = 0.8) -> np.ndarray:
    """Iso-C whose last directions are replaced by ones that single tasks have beside the others.

    Of min(rank, q, p) directions a share `common` are the leading ones of the sum, the others are
    divided equally among the tasks, rounded as the authors do: with few directions and many tasks
    (below about 2.5 T) none are left, and the result is `iso_c`. Equal updates get a flat spectrum,
    as there.

    Source: Iso-CTS, https://arxiv.org/abs/2502.04959.
    """
    size = min(rank, len(space.r_a), len(space.r_b))
    n = _n_updates(space)
    per_task = round((size - int(common * size)) / n)
    shared = _svd_of_sum(space, max(0, size - per_task * n))
    u = shared[0]
    own = [
        _low_rank_svd(left - u @ (u.T @ left), right, _size(left, right), per_task)
        for left, right in space.parts
    ]
    return _reassemble([*own, shared], space, flat=True)


def knots(space: CoreSpace, density: float) -> np.ndarray:
    """TIES on the updates written in their common left singular vectors.

    `[M_1 .. M_T] = U S [V_1 .. V_T]`; TIES merges the `S V_i`. (With a mean in place of TIES this
    is `linear`.) Equal updates merge to themselves at density 1.

    Source: KnOTS, https://arxiv.org/abs/2410.19735; the V_i in core coordinates of the inputs.
    """
    # U from its Gram matrix, sum_i M_i M_i^T; in float64, as singular values are squared there.
    wide = [(left.astype(np.float64), right.astype(np.float64)) for left, right in space.parts]
    values, vectors = np.linalg.eigh(sum(x @ (y.T @ y) @ x.T for x, y in wide))
    u = vectors[:, values > _ZERO**2 * values.max()].astype(space.r_b.dtype)
    if not u.size:
        return np.zeros((len(space.r_b), len(space.r_a)), space.r_b.dtype)
    parts = replace(space, r_b=u.T @ space.r_b).updates
    # What the rotation leaves of a zero has no sign to elect with, and is no value to average.
    zero = np.abs(parts) <= _ROUNDING * np.abs(parts).max()
    return u @ ties(np.where(zero, 0, parts), density)


def _n_updates(space: CoreSpace) -> int:
    """T without the tasks that do not have the module, to which no direction need be left."""
    return max(1, sum(rank > 0 for rank in space.ranks))


def _size(left: np.ndarray, right: np.ndarray) -> float:
    """A bound of the norm of `left @ right.T`, which tells how large its rounding may be."""
    return float(np.linalg.norm(left) * np.linalg.norm(right))


def _low_rank_svd(left: np.ndarray, right: np.ndarray, size: float, n: int) -> Triplets:
    """At most n leading singular triplets of `left @ right.T`, none that is zero beside `size`.

    Returns:
        `(q, k), (k,), (p, k)`.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    k = min(n, int((s > _ZERO * size).sum()))
    return q_left @ u[:, :k], s[:k], q_right @ vt[:k].T


def _svd_of_sum(space: CoreSpace, n: int) -> Triplets:
    u, s, vt = np.linalg.svd(space.weighted_sum(np.ones(len(space.ranks))), full_matrices=False)
    size = max(_size(*part) for part in space.parts)
    k = min(n, int((s > _ZERO * size).sum()))
    return u[:, :k], s[:k], vt[:k].T


def _nearest_orthonormal(columns: np.ndarray) -> np.ndarray:
    """The polar factor of `(q, k)`; directions that only rounding spans are left out."""
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    k = int((s > _PARALLEL).sum())
    return u[:, :k] @ vt[:k]


def _reassemble(parts: list[Triplets], space: CoreSpace, flat: bool = False) -> np.ndarray:
    """`U S V^T` of all triplets after U and V are made orthonormal; `flat` takes the mean of S."""
    u, s, v = (np.concatenate(one, axis=-1) for one in zip(*parts))
    if not len(s):
        return np.zeros((len(space.r_b), len(space.r_a)), s.dtype)
    return (_nearest_orthonormal(u) * (s.mean() if flat else s)) @ _nearest_orthonormal(v).T
