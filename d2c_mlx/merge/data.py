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
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
) -> list[Factors]:
    """The update whose outputs are closest to every task's own, on the task's inputs.

    `dW^T = (sum_i K_i)^-1 sum_i K_i dW_i^T`, with `K_i = X_i^T X_i` after two changes. Entries off
    the diagonal are multiplied by `off_diagonal`, 0.9 as the paper advises for most models. A
    ridge is added to every K_i, on both sides of the equation: without data the result is then the
    mean, and equal updates merge to themselves (a ridge in the inverse alone would shrink them).

    In float64. With fewer tokens than inputs no `in x in` matrix is formed (Woodbury).

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`.
        activations: T arrays `(n_tokens, in)`, inputs of this module for examples of each task. A
            Gram matrix G may be given as any X with `X^T X = G`.
        off_diagonal: between 0 and 1.
        ridge: above 0, as a share of the mean diagonal entry of the X_i^T X_i.

    Returns:
        T pairs whose `a @ b` sum up to the merged update: `a` changed, `b` as given.

    Source: RegMean, https://arxiv.org/abs/2212.09849.
    """
    inputs = [x.astype(np.float64) for x in activations]
    squares = np.stack([(x * x).sum(axis=0) for x in inputs])
    floor = ridge * squares.mean() or 1.0  # Without any data: the mean.
    diagonals = (1 - off_diagonal) * squares + floor
    sides = [
        off_diagonal * (x.T @ (x @ a)) + diagonal[:, None] * a
        for x, diagonal, (a, _) in zip(inputs, diagonals, factors)
    ]
    solved = _solve(
        np.sqrt(off_diagonal) * np.concatenate(inputs),
        diagonals.sum(axis=0)[:, None],
        np.concatenate(sides, axis=1),
    )
    ends = np.cumsum([len(b) for _, b in factors])[:-1]
    parts = np.split(solved, ends, axis=1)
    return [(part.astype(b.dtype), b) for part, (_, b) in zip(parts, factors)]


def _solve(x: np.ndarray, diagonal: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`(diag(diagonal) + x^T x)^-1 right`, `x (n, in)`, in whichever size is smaller."""
    n, width = x.shape
    if n >= width:
        system = x.T @ x + np.diag(diagonal[:, 0])
        return scipy.linalg.solve(system, right, assume_a="pos")
    system = np.eye(n) + x @ (x.T / diagonal)
    solved = scipy.linalg.solve(system, x @ (right / diagonal), assume_a="pos")
    return (right - x.T @ solved) / diagonal
