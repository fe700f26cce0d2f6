"""Merges of singular vectors: TSV-M, KnOTS, Iso-C and Iso-CTS.

Updates are `(T, q, p)` in core space, a result is `(q, p)`. The bases are orthonormal, so all but
KnOTS give exactly what the dense dW would. TSV-M and Iso add the tasks up as their papers do: T
near-orthogonal tasks keep their size, and a scale may follow.
"""

from __future__ import annotations

import numpy as np

from d2c_mlx.merge.combine import ties

__all__ = ["iso_c", "iso_cts", "knots", "tsv"]

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
# Singular values below this share of the norm are rounding of float32, and their vectors
# arbitrary. Among unit vectors the same holds of what tells parallel ones apart.
_ZERO, _PARALLEL = 1e-5, 1e-4


def tsv(updates: np.ndarray, rank: int) -> np.ndarray:
    """The leading `rank / T` singular triplets of every task, with interference taken out.

    Left and right vectors of all tasks are replaced by their nearest orthonormal ones. Where
    `rank / T` is no integer it is rounded up, and the caller's truncation to `rank` decides.
    Equal updates merge to their best approximation of rank `rank / T`.

    Source: Task Singular Vectors, https://arxiv.org/abs/2412.00081.
    """
    per_task = -(-rank // len(updates))
    return _reassemble([_triplets(update, per_task) for update in updates], updates.shape[1:])


def iso_c(updates: np.ndarray, rank: int) -> np.ndarray:
    """The sum of the updates with all singular values replaced by their mean.

    The mean is over the `rank` leading directions that are not zero: among equal singular values
    a later truncation would choose at random. So equal updates do not merge to themselves but to
    T times their update with a flat spectrum.

    Source: Iso-C, https://arxiv.org/abs/2502.04959.
    """
    u, s, vt = _triplets(updates.sum(axis=0), rank)
    return s.mean() * (u @ vt) if len(s) else np.zeros_like(updates[0])


def iso_cts(updates: np.ndarray, rank: int, common: float = 0.8) -> np.ndarray:
    """Iso-C whose last directions are replaced by ones that single tasks have beside the others.

    Of min(rank, q, p) directions a share `common` are the leading ones of the sum, the others are
    divided equally among the tasks, rounded as the authors do: with few directions and many tasks
    (below about 2.5 T) none are left, and the result is `iso_c`. Equal updates get a flat spectrum,
    as there.

    Source: Iso-CTS, https://arxiv.org/abs/2502.04959.
    """
    size = min(rank, *updates.shape[1:])
    per_task = round((size - int(common * size)) / len(updates))
    shared = _triplets(updates.sum(axis=0), max(0, size - per_task * len(updates)))
    u = shared[0]
    own = [_triplets(update - u @ (u.T @ update), per_task, update) for update in updates]
    return _reassemble([*own, shared], updates.shape[1:], flat=True)


def knots(updates: np.ndarray, density: float) -> np.ndarray:
    """TIES on the updates written in their common left singular vectors.

    `[M_1 .. M_T] = U S [V_1 .. V_T]`; TIES merges the `S V_i`. (With a mean in place of TIES this
    is `linear`.) Equal updates merge to themselves at density 1.

    Source: KnOTS, https://arxiv.org/abs/2410.19735; the V_i in core coordinates of the inputs.
    """
    u = _triplets(np.concatenate(updates, axis=1), updates.shape[1])[0]
    return u @ ties(u.T @ updates, density) if u.size else np.zeros_like(updates[0])


def _triplets(matrix: np.ndarray, n: int, whole: np.ndarray | None = None) -> Triplets:
    """At most n leading singular triplets `(q, k), (k,), (k, p)`, none that is zero.

    What is zero is measured by the norm of `whole`, of which `matrix` is a part; None is itself.
    """
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    size = np.linalg.norm(matrix if whole is None else whole)
    k = min(n, int((s > _ZERO * size).sum()))
    return u[:, :k], s[:k], vt[:k]


def _nearest_orthonormal(columns: np.ndarray) -> np.ndarray:
    """The polar factor of `(q, k)`; directions that only rounding spans are left out."""
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    k = int((s > _PARALLEL).sum())
    return u[:, :k] @ vt[:k]


def _reassemble(parts: list[Triplets], shape: tuple[int, ...], flat: bool = False) -> np.ndarray:
    """`U S V^T` of all triplets after U and V are made orthonormal; `flat` takes the mean of S."""
    s = np.concatenate([one for _, one, _ in parts])
    if not len(s):
        return np.zeros(shape, s.dtype)
    u = _nearest_orthonormal(np.concatenate([one for one, _, _ in parts], axis=1))
    v = _nearest_orthonormal(np.concatenate([one.T for _, _, one in parts], axis=1))
    return (u * (s.mean() if flat else s)) @ v.T
