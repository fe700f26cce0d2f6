"""Merges by least squares on the inputs of modules: RegMean, and its form with other targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from d2c_mlx.adapters.core_space import Factors

__all__ = ["Grams", "regmean"]


class Grams:
    """The Gram matrices K_i of T tasks at a module's input, and their factorised sum K.

    Modules with the same inputs (q, k and v) share one object. `K_i = X_i^T X_i` after two changes.
    Entries off the diagonal are multiplied by `off_diagonal`, 0.9 as the paper advises for most
    models. A ridge is added to every K_i, on both sides of the equation. So without data the result
    is the mean, and equal updates merge to themselves; a ridge in the inverse alone would shrink
    them.

    All is computed in the precision of the activations: what a Cholesky factorisation loses depends
    on K scaled to a diagonal of ones (Demmel, https://www.netlib.org/lapack/lawnspdf/lawn14.pdf),
    and so scaled K has no eigenvalue below `1 - off_diagonal`. With far fewer tokens than inputs no
    `in x in` matrix is formed (Woodbury); there, differences of large numbers need float64.
    """

    def __init__(
        self, activations: Sequence[np.ndarray], off_diagonal: float = 0.9, ridge: float = 1e-6
    ) -> None:
        """Factorise the sum K of the K_i.

        Args:
            activations: T arrays `(n_tokens, in)`, the module's inputs for examples of each task,
                float32 or float64. A Gram matrix G may be given as any X with `X^T X = G`.
            off_diagonal: factor on entries off the diagonal, between 0 and 1; 1 needs float64.
            ridge: share of the mean diagonal entry of the X_i^T X_i, above 0.
        """
        self._off_diagonal = off_diagonal
        dtype = np.result_type(np.float32, *activations)
        self._tokens = [x.astype(dtype, copy=False) for x in activations]
        squares = np.stack([np.einsum("ti,ti->i", x, x, dtype=np.float64) for x in self._tokens])
        floor = ridge * squares.mean() or 1.0  # 1 gives the mean where there is no data.
        self._diagonals = (1 - off_diagonal) * squares + floor
        x, total = np.concatenate(self._tokens), self._diagonals.sum(axis=0)
        self._woodbury = None
        if 4 * len(x) < len(total):  # K = S (I + Y^T Y) S
            y = x * np.sqrt(off_diagonal / total)
            self._woodbury = y, np.sqrt(total)[:, None]
            system, total = y @ y.T, np.array(1.0)
        else:
            system = x.T @ x
            system *= off_diagonal
        system[np.diag_indices(len(system))] += total
        self._factor, _ = scipy.linalg.cho_factor(system, overwrite_a=True, check_finite=False)

    def times(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """`[K_1 a_1 .. K_T a_T]`, `(in, sum r_i)`, for T arrays `a_i (in, r_i)`."""
        sides = [
            self._off_diagonal * (x.T @ (x @ a)) + diagonal[:, None].astype(x.dtype) * a
            for x, diagonal, a in zip(self._tokens, self._diagonals, columns)
        ]
        return np.concatenate(sides, axis=1)

    def nearest(self, right: np.ndarray, stack: np.ndarray, rank: int) -> Factors:
        """The low-rank V whose outputs are nearest to those of `W = K^-1 right stack`.

        `tr (V - W)^T K (V - W)` is least for W projected on the leading eigenvectors of
        `W^T K W`. The product of `right (in, n)` and `stack (n, out)` is not formed.

        Returns:
            V as `a (in, r)`, `b (r, out)` with orthonormal rows, r at most `rank`.
        """
        # With stack^T = q r, W^T K W = q r (right^T K^-1 right) r^T q^T.
        q, r = scipy.linalg.qr(stack.T.astype(np.float64), mode="economic", check_finite=False)
        if self._woodbury is None:
            half = self._half(right)
            u = _leading(r @ (half.T @ half) @ r.T, rank)
            a = self._back(self._half((right @ (r.T @ u)).astype(right.dtype)))
            return a, (q @ u).T
        y, root = self._woodbury
        whole = right / root
        half = self._half(y @ whole)
        u = _leading(r @ (whole.T @ whole - half.T @ half) @ r.T, rank)
        whole = (right @ (r.T @ u)).astype(right.dtype) / root
        return (whole - y.T @ self._back(self._half(y @ whole))) / root, (q @ u).T

    def nearest_to(
        self, right: np.ndarray, stack: np.ndarray, lacking: Sequence[np.ndarray], rank: int
    ) -> Factors:
        """`nearest` for `W = K^-1 (right stack + sum_i X_i^T Y_i)`, T arrays `Y_i (n_tokens, out)`.

        `X_i` has the factor `off_diagonal`, as it has in K_i.
        """
        if self._woodbury is not None:
            tokens = self._off_diagonal * np.concatenate(self._tokens).T
            right, stack = (
                np.concatenate([right, tokens], axis=1),
                np.concatenate([stack, *lacking]),
            )
            return self.nearest(right, stack, rank)
        total = (stack.T @ right.T).T  # in the order of Fortran
        for x, outputs in zip(self._tokens, lacking):
            total.T[:] += (self._off_diagonal * outputs).T @ x
        # With K = L L^T and h = L^-1 total, W^T K W = h^T h, and W is L^-T h.
        half = self._half(total, overwrite=True)
        if half.shape[1] <= len(half):
            u = _leading(half.T @ half, rank)
        else:
            across = half.T @ _leading(half @ half.T, rank)
            u, _ = scipy.linalg.qr(across, mode="economic", check_finite=False)
        return self._back(half @ u), u.T

    def _half(self, right: np.ndarray, overwrite: bool = False) -> np.ndarray:
        """`L^-1 right`, where `L L^T` is the factorised matrix."""
        return scipy.linalg.solve_triangular(
            self._factor, right, trans="T", overwrite_b=overwrite, check_finite=False
        )

    def _back(self, right: np.ndarray) -> np.ndarray:
        """`L^-T right`."""
        return scipy.linalg.solve_triangular(self._factor, right, check_finite=False)


def regmean(
    factors: Sequence[Factors],
    grams: Grams,
    rank: int,
    lacking: Sequence[np.ndarray] | None = None,
) -> Factors:
    """RegMean: the low-rank update whose outputs best match every task's own on its inputs.

    Use it where activations can be had. With `W = K^-1 sum_i K_i a_i b_i`, K the sum of the K_i,
    the inputs also decide what to keep in the rank of the result. Among the updates V of that rank,
    `tr (V - W)^T K (V - W)` is least for W with its outputs projected on the leading eigenvectors
    of `W^T K W` (reduced-rank regression). The V nearest to W in Frobenius norm is another one.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`.
        grams: Gram matrices of the module, of the T tasks.
        rank: most columns of the result.
        lacking: T arrays `(n_tokens, out)`, errors Y_i to compensate in the outputs, as layer-wise
            merging does: `W = K^-1 (sum_i K_i a_i b_i + X_i^T Y_i)`. None compensates none.

    Returns:
        `a (in, r)`, `b (r, out)` with orthonormal rows, r at most `rank`.

    Source: RegMean, https://arxiv.org/abs/2212.09849; the rank: Izenman,
    https://doi.org/10.1016/0047-259X(75)90042-1.
    """
    right, stack = grams.times([a for a, _ in factors]), np.concatenate([b for _, b in factors])
    if lacking is None:
        a, b = grams.nearest(right, stack, rank)
    else:
        a, b = grams.nearest_to(right, stack, lacking, rank)
    return a.astype(stack.dtype), b.astype(stack.dtype)


def _leading(core: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors of a symmetric matrix for its largest eigenvalues, at most `(n, rank)`."""
    leading = [max(0, len(core) - rank), len(core) - 1]
    return scipy.linalg.eigh((core + core.T) / 2, subset_by_index=leading, check_finite=False)[1]
