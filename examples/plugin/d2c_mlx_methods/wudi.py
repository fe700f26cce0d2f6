"""A merge that minimises an objective without data: WUDI."""

from __future__ import annotations

import numpy as np

from d2c_mlx.adapters.core_space import CoreSpace

__all__ = ["wudi"]


def wudi(space: CoreSpace) -> np.ndarray:
    """Find the update t that least disturbs every task on its own inputs.

    Use it where there are no activations; with them `regmean` is better. It minimises
    `sum_i |(t - t_i) t_i^T|^2 / |t_i|^2`, where rows of t_i stand for task i's inputs. The paper
    runs Adam from the sum of the t_i. The objective is quadratic, so this is the minimum that
    gradient descent from there converges to: `t G = sum_i t_i t_i^T t_i / |t_i|^2` with
    `G = sum_i t_i^T t_i / |t_i|^2`, solved by the pseudo-inverse. The start does not matter: all
    t_i, and so their sum, lie in the span of G, where the minimum is unique. Equal updates merge to
    themselves; near-orthogonal ones nearly add up.

    Args:
        space: the T updates.

    Returns:
        `(q, p)`.

    Source: WUDI-Merging, https://arxiv.org/abs/2503.08099.
    """
    # These are squares of singular values; float64 keeps the small ones.
    gram, right_side = np.zeros((len(space.r_a),) * 2), np.zeros((len(space.r_b), len(space.r_a)))
    for left, right in space.parts:
        left, right = left.astype(np.float64), right.astype(np.float64)
        inner, outer = left.T @ left, right.T @ right
        norm = (inner * outer).sum()
        # A product that cancels is a rounding error of float32, and no task.
        if norm > 1e-12 * np.trace(inner) * np.trace(outer):
            scaled = right @ (inner / norm)
            gram += scaled @ right.T
            right_side += left @ (right.T @ scaled) @ right.T
    # Rounding errors are at 1e-14 of the largest eigenvalue; directions worth keeping are above.
    inverse = np.linalg.pinv(gram, rcond=1e-11, hermitian=True)
    return (right_side @ inverse).astype(space.r_a.dtype)
