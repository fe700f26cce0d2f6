"""Merges that look at data: RegMean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from d2c_mlx.merge.core import Factors

__all__ = ["regmean"]


def regmean(
    factors: Sequence[Factors],
    activations: Sequence[np.ndarray],
    rank: int,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
) -> Factors:
    """The update of a rank whose outputs are closest to every task's own, on the task's inputs.

    `W = K^-1 sum_i K_i a_i b_i`, K the sum of `K_i = X_i^T X_i` after two changes. Entries off
    the diagonal are multiplied by `off_diagonal`, 0.9 as the paper advises for most models. A
    ridge is added to every K_i, on both sides of the equation: without data the result is then the
    mean, and equal updates merge to themselves (a ridge in the inverse alone would shrink them).

    What a rank loses is judged on the inputs too: of all updates V of that rank the one with the
    least `tr (V - W)^T K (V - W)` is W with its outputs projected on the leading eigenvectors of
    `W^T K W` (reduced-rank regression). The rank nearest to W in Frobenius norm is another one.

    In float64. With fewer tokens than inputs no `in x in` matrix is formed (Woodbury).

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`.
        activations: T arrays `(n_tokens, in)`, inputs of this module for examples of each task. A
            Gram matrix G may be given as any X with `X^T X = G`.
        rank: most columns of the result.
        off_diagonal: between 0 and 1.
        ridge: above 0, as a share of the mean diagonal entry of the X_i^T X_i.

    Returns:
        `a (in, r)`, `b (r, out)` with orthonormal rows, r at most `rank`.

    Source: RegMean, https://arxiv.org/abs/2212.09849; the rank: Izenman,
    https://doi.org/10.1016/0047-259X(75)90042-1.
    """
    inputs = [x.astype(np.float64) for x in activations]
    squares = np.stack([(x * x).sum(axis=0) for x in inputs])
    floor = ridge * squares.mean() or 1.0  # Without any data: the mean.
    diagonals = (1 - off_diagonal) * squares + floor
    sides = [
        off_diagonal * (x.T @ (x @ a)) + diagonal[:, None] * a
        for x, diagonal, (a, _) in zip(inputs, diagonals, factors)
    ]
    right = np.concatenate(sides, axis=1)
    solved = _solve(
        np.sqrt(off_diagonal) * np.concatenate(inputs), diagonals.sum(axis=0)[:, None], right
    )
    # W = solved @ stack with stack^T = q r, and W^T K W = q r (solved^T right) r^T q^T.
    stack = np.concatenate([b for _, b in factors])
    q, r = scipy.linalg.qr(stack.T.astype(np.float64), mode="economic")
    core = r @ (solved.T @ right) @ r.T
    leading = [max(0, len(core) - rank), len(core) - 1]
    _, u = scipy.linalg.eigh((core + core.T) / 2, subset_by_index=leading)
    return (solved @ (r.T @ u)).astype(stack.dtype), (q @ u).T.astype(stack.dtype)


def _solve(x: np.ndarray, diagonal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`(diag(diagonal) + x^T x)^-1 right`, `x (n, in)`, in whichever size is smaller."""
    n, width = x.shape
    if n >= width:
        system = x.T @ x + np.diag(diagonal[:, 0])
        return scipy.linalg.solve(system, right, assume_a="pos")
    system = np.eye(n) + x @ (x.T / diagonal)
    solved = scipy.linalg.solve(system, x @ (right / diagonal), assume_a="pos")
    return (right - x.T @ solved) / diagonal
