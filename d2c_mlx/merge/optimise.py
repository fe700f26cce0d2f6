"""Merges that minimise an objective without data: WUDI."""

from __future__ import annotations

import numpy as np

__all__ = ["wudi"]


def wudi(updates: np.ndarray) -> np.ndarray:
    """The update t that least disturbs every task on its own inputs.

    Minimises `sum_i |(t - t_i) t_i^T|^2 / |t_i|^2` (rows of t_i stand for task i's inputs). The
    paper runs Adam from the sum of the t_i; the objective is quadratic, so this is the minimum
    that gradient descent from there converges to: `t G = sum_i t_i t_i^T t_i / |t_i|^2` with
    `G = sum_i t_i^T t_i / |t_i|^2`, solved by the pseudo-inverse. It does not depend on the
    start: all t_i, and so the sum, lie in the span of G, where the minimum is unique. Equal
    updates merge to themselves; near-orthogonal ones nearly add up.

    Args:
        updates: `(T, q, p)`.

    Returns:
        `(q, p)`.

    Source: WUDI-Merging, https://arxiv.org/abs/2503.08099.
    """
    # Squares of singular values: in float64, so that small ones are not lost.
    wide = updates.astype(np.float64)
    norms = np.linalg.norm(wide, axis=(1, 2), keepdims=True)
    unit = wide / np.where(norms > 0, norms, 1)
    grams = unit.transpose(0, 2, 1) @ unit
    # Rounding of float32 is at 1e-14 of the largest eigenvalue, directions worth keeping above.
    inverse = np.linalg.pinv(grams.sum(axis=0), rcond=1e-11, hermitian=True)
    return ((wide @ grams).sum(axis=0) @ inverse).astype(updates.dtype)
