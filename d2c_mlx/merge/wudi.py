"""Merges that minimise an objective without data: WUDI."""

from __future__ import annotations

import numpy as np

from d2c_mlx.adapters.core_space import CoreSpace

__all__ = ["wudi"]


def wudi(space: CoreSpace) -> np.ndarray:
    """The update t that least disturbs every task on its own inputs.

    Minimises `sum_i |(t - t_i) t_i^T|^2 / |t_i|^2` (rows of t_i stand for task i's inputs). The
    paper runs Adam from the sum of the t_i; the objective is quadratic, so this is the minimum
    that gradient descent from there converges to: `t G = sum_i t_i t_i^T t_i / |t_i|^2` with
    `G = sum_i t_i^T t_i / |t_i|^2`, solved by the pseudo-inverse. It does not depend on the
    start: all t_i, and so the sum, lie in the span of G, where the minimum is unique. Equal
    updates merge to themselves; near-orthogonal ones nearly add up.

    Returns:
        `(q, p)`.

    Source: WUDI-Merging, https://arxiv.org/abs/2503.08099.
    """
    # Squares of singular values: in float64, so that small ones are not lost.
    gram, right_side = np.zeros((len(space.r_a),) * 2), np.zeros((len(space.r_b), len(space.r_a)))
    for left, right in space.parts:
        left, right = left.astype(np.float64), right.astype(np.float64)
        inner, outer = left.T @ left, right.T @ right
        norm = (inner * outer).sum()
        # A product that cancels to nothing is rounding of float32: no task.
        if norm > 1e-12 * np.trace(inner) * np.trace(outer):
            scaled = right @ (inner / norm)
            gram += scaled @ right.T
            right_side += left @ (right.T @ scaled) @ right.T
    # That rounding is at 1e-14 of the largest eigenvalue, directions worth keeping are above.
    inverse = np.linalg.pinv(gram, rcond=1e-11, hermitian=True)
    return (right_side @ inverse).astype(space.r_a.dtype)
