"""Merges of singular vectors: KnOTS, Iso-C, Iso-CTS, Pico and CtM.

A result is `(q, p)` in core space. The bases are orthonormal, so all but KnOTS give exactly what
the dense dW would. Iso adds the tasks up as its paper does: T near-orthogonal tasks keep their
size, and a scale may follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import scipy.linalg

from d2c_mlx.adapters.core_space import CoreSpace, Factors
from d2c_mlx.merge.combine import (
    ZERO,
    Triplets,
    leading_triplets,
    n_updates,
    norm_bound,
    reassemble,
    ties,
)

__all__ = ["ctm", "iso_c", "iso_cts", "knots", "pico"]

# Rounding errors of float32, as a share of the largest entry.
_ROUNDING = 1e-6
# CtM's rounds, and the share of the energy by which one must gain for the next.
_ROUNDS, _GAIN = 50, 1e-6


def iso_c(space: CoreSpace, rank: int) -> np.ndarray:
    """Add the updates up and replace all singular values of the sum by their mean.

    Use it for tasks that share much; sizes are lost, so tune the scale. The mean is over the `rank`
    leading directions that are not zero, because a later truncation would choose at random among
    equal singular values. So equal updates do not merge to themselves but to T times their update
    with a flat spectrum.

    Args:
        space: the T updates.
        rank: rank that the merge will be truncated to.

    Returns:
        `(q, p)`.

    Source: Iso-C, https://arxiv.org/abs/2502.04959.
    """
    return _flattened([_svd_of_sum(space, rank)], space)


def iso_cts(space: CoreSpace, rank: int, common: float = 0.8) -> np.ndarray:
    """Merge as `iso_c`, with the last directions replaced by directions of single tasks.

    Use it for tasks that need some directions of their own, at a rank above 2.5 T. A share `common`
    of min(rank, q, p) directions are the leading ones of the sum. The others are divided equally
    among the tasks, rounded as the authors do. Below about 2.5 T directions none are left for
    tasks, and the result is `iso_c`. Equal updates get a flat spectrum, as there.

    Args:
        space: the T updates.
        rank: rank that the merge will be truncated to.
        common: share of the directions that the tasks have in common.

    Returns:
        `(q, p)`.

    Source: Iso-CTS, https://arxiv.org/abs/2502.04959.
    """
    size = min(rank, len(space.r_a), len(space.r_b))
    n = n_updates(space)
    per_task = round((size - int(common * size)) / n)
    shared = _svd_of_sum(space, max(0, size - per_task * n))
    u = shared[0]
    own = [
        leading_triplets(left - u @ (u.T @ left), right, norm_bound(left, right), per_task)
        for left, right in space.parts
    ]
    return _flattened([*own, shared], space)


def knots(space: CoreSpace, density: float) -> np.ndarray:
    """Merge by `ties` on the updates in the basis of their common left singular vectors.

    Use it instead of `ties` where adapters were trained from different seeds. With
    `[M_1 .. M_T] = U S [V_1 .. V_T]`, TIES merges the `S V_i`; a mean in place of TIES would be
    `linear`. Equal updates merge to themselves at density 1.

    Args:
        space: the T updates.
        density: share of entries kept by TIES.

    Returns:
        `(q, p)`.

    Source: KnOTS, https://arxiv.org/abs/2410.19735; the V_i in core coordinates of the inputs.
    """
    values, vectors = np.linalg.eigh(_gram(_wide(space)))
    u = vectors[:, values > ZERO**2 * values.max()].astype(space.r_b.dtype)
    if not u.size:
        return np.zeros((len(space.r_b), len(space.r_a)), space.r_b.dtype)
    parts = replace(space, r_b=u.T @ space.r_b).updates
    # Zeros that the rotation left as rounding errors must neither vote for a sign nor be averaged.
    zero = np.abs(parts) <= _ROUNDING * np.abs(parts).max()
    return u @ ties(np.where(zero, 0, parts), density)


def pico(space: CoreSpace) -> np.ndarray:
    """The mean, with output directions that many tasks share made smaller.

    Use it in place of `linear`. A direction `u_j` of all outputs with a share `s_j` of the energy
    of all updates is multiplied by `1 / (1 + (T - 1) s_j)`; the result gets the mean norm of the
    updates. The paper's B is that of factors whose A has orthonormal rows, so that nothing depends
    on how a dW is factored. T counts the tasks that have the module. Equal updates do not merge to
    themselves: their spectrum gets flatter.

    Args:
        space: the T updates.

    Returns:
        `(q, p)`.

    Source: Pico, https://arxiv.org/abs/2604.16826.
    """
    parts, n = _wide(space), n_updates(space)
    values, u = np.linalg.eigh(_gram(parts))
    share = np.maximum(values, 0) / max(values.sum(), np.finfo(float).tiny)
    damped = u * (1 / (1 + (n - 1) * share))
    mean = damped @ (u.T @ space.weighted_sum(np.full(len(parts), 1 / n)))
    size = sum(_norm(*part) for part in parts) / n
    norm = np.linalg.norm(mean)
    # Where updates cancel, only rounding would be made as large as they are.
    return (mean * (size / norm if norm > ZERO * size else 0)).astype(space.r_b.dtype)


def ctm(space: CoreSpace, rank: int, density: float) -> np.ndarray:
    """Merge by `ties` within the `rank` output and input directions that the tasks share best.

    Use it in place of `ties` where the rank is small: the rank is there before merging, and nothing
    is cut off afterwards. U and V maximise `sum |U^T M_i V|^2` over updates of equal norm
    (Tucker-2, by alternating eigendecompositions); TIES merges the `U^T M_i V`. Equal updates merge
    to themselves at density 1, if there is room for their rank.

    Args:
        space: the T updates.
        rank: rank of the merge.
        density: share of entries kept by TIES.

    Returns:
        `(q, p)`.

    Source: Compress then Merge, https://arxiv.org/abs/2606.03723, with its beta of 0.
    """
    parts = _wide(space)
    unit = [(x / norm, y) for x, y in parts if (norm := _norm(x, y)) > 0]
    if not unit:
        return np.zeros((len(space.r_b), len(space.r_a)), space.r_b.dtype)
    v, before = _leading(_gram([(y, x) for x, y in unit]), rank)[1], 0.0
    for _ in range(_ROUNDS):
        _, u = _leading(_gram([(x, v.T @ y) for x, y in unit]), rank)
        energy, v = _leading(_gram([(y, u.T @ x) for x, y in unit]), rank)
        if energy - before <= _GAIN * energy:
            break
        before = energy
    cores = np.stack([(u.T @ x) @ (y.T @ v) for x, y in parts])
    # Zeros that the bases left as rounding errors have no sign.
    cores[np.abs(cores) <= _ROUNDING * np.abs(cores).max()] = 0
    return (u @ ties(cores, density) @ v.T).astype(space.r_b.dtype)


def _wide(space: CoreSpace) -> list[Factors]:
    """The parts in float64, as Gram matrices square singular values."""
    return [(left.astype(np.float64), right.astype(np.float64)) for left, right in space.parts]


def _gram(parts: Sequence[Factors]) -> np.ndarray:
    """The sum of `M M^T`, `(q, q)`, where `M = left @ right.T`."""
    return sum(left @ (right.T @ right) @ left.T for left, right in parts)


def _leading(gram: np.ndarray, n: int) -> tuple[float, np.ndarray]:
    """The sum of the n largest eigenvalues, and their vectors as columns."""
    size = len(gram)
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=[max(0, size - n), size - 1])
    return float(values.sum()), vectors


def _norm(left: np.ndarray, right: np.ndarray) -> float:
    """The norm of `left @ right.T`."""
    return float(np.sqrt(np.sum((left.T @ left) * (right.T @ right))))


def _svd_of_sum(space: CoreSpace, n: int) -> Triplets:
    u, s, vt = np.linalg.svd(space.weighted_sum(np.ones(len(space.ranks))), full_matrices=False)
    size = max(norm_bound(*part) for part in space.parts)
    k = min(n, int((s > ZERO * size).sum()))
    return u[:, :k], s[:k], vt[:k].T


def _flattened(parts: Sequence[Triplets], space: CoreSpace) -> np.ndarray:
    """`reassemble` with the mean of all singular values in place of each."""
    values = np.concatenate([s for _, s, _ in parts])
    mean = values.mean() if len(values) else 0.0
    return reassemble([(u, np.full_like(s, mean), v) for u, s, v in parts], space)
