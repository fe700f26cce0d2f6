"""Merges by least squares on the inputs of modules: RegMean, and its form with other targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from d2c_mlx.adapters.core_space import Factors

__all__ = ["Grams", "matched", "regmean"]


class Grams:
    """The Gram matrices K_i of T tasks at a module's input, and their factorised sum K.

    Modules with the same inputs (q, k and v) share one object. `K_i = X_i^T X_i` after two changes.
    Entries off the diagonal are multiplied by `off_diagonal`, 0.9 as the paper advises for most
    models. A ridge is added to every K_i, on both sides of the equation. So without data the result
    is the mean, and equal updates merge to themselves; a ridge in the inverse alone would shrink
    them. Everything is float64. With fewer tokens than inputs no `in x in` matrix is formed
    (Woodbury).
    """

    def __init__(
        self, activations: Sequence[np.ndarray], off_diagonal: float = 0.9, ridge: float = 1e-6
    ) -> None:
        """Factorise the sum K of the K_i.

        Args:
            activations: T arrays `(n_tokens, in)`, the module's inputs for examples of each task.
                A Gram matrix G may be given as any X with `X^T X = G`.
            off_diagonal: factor on entries off the diagonal, between 0 and 1.
            ridge: share of the mean diagonal entry of the X_i^T X_i, above 0.
        """
        self._off_diagonal = off_diagonal
        self._given = list(activations)
        self._tokens = [x.astype(np.float64) for x in activations]
        squares = np.stack([(x * x).sum(axis=0) for x in self._tokens])
        floor = ridge * squares.mean() or 1.0  # 1 gives the mean where there is no data.
        self._diagonals = (1 - off_diagonal) * squares + floor
        total = self._diagonals.sum(axis=0)
        x = np.sqrt(off_diagonal) * np.concatenate(self._tokens)
        # Woodbury's identity, where x has fewer rows than columns.
        self._woodbury = (x, total[:, None]) if len(x) < x.shape[1] else None
        system = x @ (x / total).T if self._woodbury else x.T @ x
        system[np.diag_indices(len(system))] += 1.0 if self._woodbury else total
        self._factor = scipy.linalg.cho_factor(system, overwrite_a=True, check_finite=False)

    def times(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """`[K_1 a_1 .. K_T a_T]`, `(in, sum r_i)`, for T arrays `a_i (in, r_i)`."""
        sides = [
            self._off_diagonal * (x.T @ (x @ a)) + diagonal[:, None] * a
            for x, diagonal, a in zip(self._tokens, self._diagonals, columns)
        ]
        return np.concatenate(sides, axis=1)

    def add_against(self, outputs: Sequence[np.ndarray], to: np.ndarray) -> None:
        """Add `off_diagonal * sum_i X_i^T Y_i` to `(in, out)`, for T `Y_i (n_tokens, out)`.

        It keeps the precision of the outputs, because nothing is solved here.
        """
        for x, y in zip(self._given, outputs):
            to += x.T @ (self._off_diagonal * y)

    def solve(self, right: np.ndarray) -> np.ndarray:
        """`K^-1 right`, both `(in, n)`."""
        if self._woodbury is None:
            return scipy.linalg.cho_solve(self._factor, right, check_finite=False)
        x, total = self._woodbury
        inner = scipy.linalg.cho_solve(self._factor, x @ (right / total), check_finite=False)
        return (right - x.T @ inner) / total

    def norms(self, right: np.ndarray) -> np.ndarray:
        """`right^T K^-1 right`, `(n, n)`, for `right (in, n)`."""
        if self._woodbury is None:
            half = self._lower(right)
            return half.T @ half
        x, total = self._woodbury
        half, whole = self._lower((x / total[:, 0]) @ right), right / np.sqrt(total)
        return whole.T @ whole - half.T @ half

    def _lower(self, right: np.ndarray) -> np.ndarray:
        """`L^-1 right`, where `L L^T` is the factorised matrix."""
        factor, _ = self._factor
        return scipy.linalg.solve_triangular(factor, right, trans="T", check_finite=False)


def regmean(factors: Sequence[Factors], grams: Grams, rank: int) -> Factors:
    """RegMean: the low-rank update whose outputs best match every task's own on its inputs.

    Use it where activations can be had; `wudi` does without. With `W = K^-1 sum_i K_i a_i b_i`, K
    the sum of the K_i, the inputs also decide what to keep in the rank of the result. Among the
    updates V of that rank, `tr (V - W)^T K (V - W)` is least for W with its outputs projected on
    the leading eigenvectors of `W^T K W` (reduced-rank regression). The V nearest to W in Frobenius
    norm is another one.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`.
        grams: Gram matrices of the module, of the T tasks.
        rank: most columns of the result.

    Returns:
        `a (in, r)`, `b (r, out)` with orthonormal rows, r at most `rank`.

    Source: RegMean, https://arxiv.org/abs/2212.09849; the rank: Izenman,
    https://doi.org/10.1016/0047-259X(75)90042-1.
    """
    right = grams.times([a for a, _ in factors])
    solved = grams.solve(right)
    # W = solved @ stack with stack^T = q r, and W^T K W = q r (solved^T right) r^T q^T.
    stack = np.concatenate([b for _, b in factors])
    q, r = scipy.linalg.qr(stack.T.astype(np.float64), mode="economic", check_finite=False)
    u = _leading(r @ (solved.T @ right) @ r.T, rank)
    return (solved @ (r.T @ u)).astype(stack.dtype), (q @ u).T.astype(stack.dtype)


def matched(
    factors: Sequence[Factors], grams: Grams, lacking: Sequence[np.ndarray], rank: int
) -> Factors:
    """The low-rank update whose outputs best match every task's own plus an error to compensate.

    `W = K^-1 (sum_i K_i a_i b_i + X_i^T Y_i)`, truncated as in `regmean`, which it equals where
    all Y_i are zero. Layer-wise merging uses it, see layerwise.py.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`.
        grams: Gram matrices of the module, of the T tasks.
        lacking: T arrays `(n_tokens, out)`, the errors Y_i to compensate in the outputs.
        rank: most columns of the result.

    Returns:
        `a (in, r)`, `b (r, out)` with orthonormal rows, r at most `rank`.
    """
    stack = np.concatenate([b for _, b in factors])
    right = grams.times([a for a, _ in factors]) @ stack
    grams.add_against(lacking, to=right)
    if right.shape[1] <= right.shape[0]:
        u = _leading(grams.norms(right), rank)
        projected = right @ u
    else:  # right^T = q r, in the memory of right.
        q, r = scipy.linalg.qr(right.T, overwrite_a=True, mode="economic", check_finite=False)
        leading = _leading(grams.norms(r.T), rank)
        u, projected = q @ leading, r.T @ leading
    return grams.solve(projected).astype(stack.dtype), u.T.astype(stack.dtype)


def _leading(core: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors of a symmetric matrix for its largest eigenvalues, at most `(n, rank)`."""
    leading = [max(0, len(core) - rank), len(core) - 1]
    return scipy.linalg.eigh((core + core.T) / 2, subset_by_index=leading, check_finite=False)[1]
