"""Merges of one module: TIES and TSV-M in core space, RegMean on the inputs of the module.

In core space updates are `(T, q, p)`, or in factors as `CoreSpace.parts`, so that memory does not
grow with T dense updates; a result is `(q, p)`. The bases are orthonormal, so TSV-M gives exactly
what the dense dW would. Entries, which TIES works on, depend on the basis: in its paper it is the
model's; here it is the QR of the stacked factors, adapters in their order.
"""

from collections.abc import Sequence

import numpy as np
import scipy.linalg

from d2c_mlx.adapters.core_space import CoreSpace, Factors

# Singular vectors as columns and values: `(q, k), (k,), (p, k)`.
Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
# Rounding errors of float32: singular values as a share of the whole (their vectors are arbitrary),
# singular values of unit vectors that are parallel, and sums as a share of the largest entry.
ZERO, _PARALLEL, _CANCELLED = 1e-5, 1e-4, 1e-6


def ties(updates: np.ndarray, density: float) -> np.ndarray:
    """Trim every update, elect a sign per entry, and average the entries that agree with it.

    Use it when tasks pull in opposite directions. Of every update the largest entries are kept by
    magnitude, at least one; equal ones are all kept. Equal updates merge to the trimmed update, at
    density 1 to themselves.

    Args:
        updates: `(T, q, p)`.
        density: share of entries kept.

    Returns:
        `(q, p)`.

    Source: TIES-Merging, https://arxiv.org/abs/2306.01708, which trims over all modules at once; on
    core entries as in https://arxiv.org/abs/2509.17786.
    """
    flat = np.abs(updates).reshape(len(updates), -1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = np.partition(flat, -keep, axis=1)[:, -keep]
    trimmed = np.where(np.abs(updates) >= threshold[:, None, None], updates, 0)
    signs = elected_signs(trimmed)
    agree = (np.sign(trimmed) == signs) & (signs != 0)
    count = np.maximum(agree.sum(axis=0), 1).astype(trimmed.dtype)
    return np.where(agree, trimmed, 0).sum(axis=0) / count


def elected_signs(updates: np.ndarray) -> np.ndarray:
    """`(q, p)` signs of the sums over the updates; 0 where they cancel up to rounding."""
    total = updates.sum(axis=0)
    return np.where(np.abs(total) > _CANCELLED * np.abs(updates).max(), np.sign(total), 0)


def tsv(space: CoreSpace, rank: int) -> np.ndarray:
    """Add up the leading `rank / T` singular triplets of every task, with interference removed.

    Use it for many tasks with steep spectra. The left and right vectors of all tasks are replaced
    by their nearest orthonormal ones. Tasks are added up: near-orthogonal ones keep their size, and
    a scale may follow. T counts the tasks that have the module. Where `rank / T` is no integer it
    is rounded up, and the caller's truncation to `rank` decides. Equal updates merge to their best
    approximation of rank `rank / T`.

    Args:
        space: the T updates.
        rank: rank that the merge will be truncated to.

    Returns:
        `(q, p)`.

    Source: Task Singular Vectors, https://arxiv.org/abs/2412.00081.
    """
    per_task = -(-rank // n_updates(space))
    triplets = [
        leading_triplets(left, right, norm_bound(left, right), per_task)
        for left, right in space.parts
    ]
    return reassemble(triplets, space)


def n_updates(space: CoreSpace) -> int:
    """T without the tasks that lack the module, which need no direction; at least 1."""
    return max(1, sum(rank > 0 for rank in space.ranks))


def norm_bound(left: np.ndarray, right: np.ndarray) -> float:
    """An upper bound on the norm of `left @ right.T`, and so on its rounding errors."""
    return float(np.linalg.norm(left) * np.linalg.norm(right))


def leading_triplets(left: np.ndarray, right: np.ndarray, size: float, n: int) -> Triplets:
    """At most n leading singular triplets of `left (q, r) @ right.T (r, p)`, without rounding.

    What is small beside `size`, see `norm_bound`, is a rounding error.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right)
    u, s, vt = np.linalg.svd(r_left @ r_right.T)
    k = min(n, int((s > ZERO * size).sum()))
    return q_left @ u[:, :k], s[:k], q_right @ vt[:k].T


def reassemble(parts: Sequence[Triplets], space: CoreSpace) -> np.ndarray:
    """`U S V^T` of all triplets, `(q, p)`, with U and V made orthonormal (their polar factors)."""
    u, s, v = (np.concatenate(columns, axis=-1) for columns in zip(*parts))
    if not len(s):
        return np.zeros((len(space.r_b), len(space.r_a)), s.dtype)
    nearest = []
    for columns in (u, v):
        left, values, right = np.linalg.svd(columns, full_matrices=False)
        k = int((values > _PARALLEL).sum())  # no direction that only rounding errors span
        nearest.append(left[:, :k] @ right[:k])
    return (nearest[0] * s) @ nearest[1].T


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

    def nearest(
        self,
        right: np.ndarray,
        stack: np.ndarray,
        rank: int,
        lacking: Sequence[np.ndarray] | None = None,
    ) -> Factors:
        """The low-rank V whose outputs are nearest to those of a W that is not formed.

        `W = K^-1 (right stack + sum_i X_i^T Y_i)` for `right (in, n)`, `stack (n, out)` and T
        arrays `Y_i (n_tokens, out)` of what is lacking; `X_i` has the factor `off_diagonal`, as in
        K_i. `tr (V - W)^T K (V - W)` is least for W projected on the leading eigenvectors of
        `W^T K W`.

        Returns:
            V as `a (in, r)`, `b (r, out)` with orthonormal rows, r at most `rank`.
        """
        y, root = self._woodbury or (None, None)
        if lacking is not None and y is None:
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
        if lacking is not None:
            tokens = self._off_diagonal * np.concatenate(self._tokens).T
            right, stack = np.hstack([right, tokens]), np.concatenate([stack, *lacking])
        # With stack^T = q r, W^T K W = q r (right^T K^-1 right) r^T q^T.
        q, r = scipy.linalg.qr(stack.T.astype(np.float64), mode="economic", check_finite=False)
        if y is None:
            half = self._half(right)
            u = _leading(r @ (half.T @ half) @ r.T, rank)
            return self._back(self._half((right @ (r.T @ u)).astype(right.dtype))), (q @ u).T
        whole = right / root
        half = self._half(y @ whole)
        u = _leading(r @ (whole.T @ whole - half.T @ half) @ r.T, rank)
        whole = (right @ (r.T @ u)).astype(right.dtype) / root
        return (whole - y.T @ self._back(self._half(y @ whole))) / root, (q @ u).T

    def _half(self, right: np.ndarray, overwrite: bool = False) -> np.ndarray:
        """`L^-1 right`, where `L L^T` is the factorised matrix."""
        return scipy.linalg.solve_triangular(
            self._factor, right, trans="T", overwrite_b=overwrite, check_finite=False
        )

    def _back(self, right: np.ndarray) -> np.ndarray:
        """`L^-T right`."""
        return scipy.linalg.solve_triangular(self._factor, right, check_finite=False)


class OutputMetric:
    """A metric on a module's outputs, in which an error `e (1, out)` costs `e G e^T`.

    G is the mean outer product of the loss's derivatives by the outputs, of trace `out`, mixed with
    the identity: few rows tell little of directions that they do not use.

    Source: the output factor of K-FAC, https://arxiv.org/abs/1503.05671.
    """

    def __init__(self, gradients: Sequence[np.ndarray], ridge: float = 0.3) -> None:
        """Take derivatives, arrays `(n, out)`; `ridge` is the share of the identity."""
        _, s, self._vt = scipy.linalg.svd(
            np.concatenate(gradients), full_matrices=False, check_finite=False
        )
        share = s**2 / max(float((s**2).sum()), np.finfo(s.dtype).tiny)
        self._ridge = ridge
        self._weights = (1 - ridge) * self._vt.shape[1] * share + ridge

    def times(self, rows: np.ndarray, power: float) -> np.ndarray:
        """`rows G^power`, `(n, out)`."""
        flat = self._ridge**power
        along = (rows @ self._vt.T) * (self._weights**power - flat)
        return flat * rows + along @ self._vt


def regmean(
    factors: Sequence[Factors],
    grams: Grams,
    rank: int,
    lacking: Sequence[np.ndarray] | None = None,
    metric: OutputMetric | None = None,
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
        metric: says which outputs the rank is spent on; W is the same. None: all alike.

    Returns:
        `a (in, r)`, `b (r, out)`, r at most `rank`; rows of b are orthonormal without a metric.

    Source: RegMean, https://arxiv.org/abs/2212.09849; the rank: Izenman,
    https://doi.org/10.1016/0047-259X(75)90042-1.
    """
    right, stack = grams.times([a for a, _ in factors]), np.concatenate([b for _, b in factors])
    if metric:
        stack = metric.times(stack, 0.5)
        lacking = lacking and [metric.times(outputs, 0.5) for outputs in lacking]
    a, b = grams.nearest(right, stack, rank, lacking)
    b = metric.times(b, -0.5) if metric else b
    return a.astype(stack.dtype), b.astype(stack.dtype)


def _leading(core: np.ndarray, rank: int) -> np.ndarray:
    """Eigenvectors of a symmetric matrix for its largest eigenvalues, at most `(n, rank)`."""
    leading = [max(0, len(core) - rank), len(core) - 1]
    return scipy.linalg.eigh((core + core.T) / 2, subset_by_index=leading, check_finite=False)[1]
