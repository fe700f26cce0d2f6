"""The core space, in which LoRA updates are merged exactly without forming a dense dW.

Stack the factors of T adapters and take QR: `[a_1 .. a_T] = Q_a R_a`, `[b_1^T .. b_T^T] = Q_b R_b`.
Every `dW_i = Q_b M_i Q_a^T` with a small `M_i`, so any method may work on the M_i. It is
lossless for any mix of ranks. Source: Core Space Merging, https://arxiv.org/abs/2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

__all__ = ["CoreSpace", "Factors", "best_factors", "factorise", "to_core"]

Factors = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class CoreSpace:
    """T updates of one module: `dW_i = q_b @ updates[i] @ q_a.T`.

    Attributes:
        q_a: `(in, p)`, orthonormal columns, p at most the sum of ranks.
        q_b: `(out, q)`, the same for the outputs.
        r_a: `(p, R)`, the stacked columns of `a` in these coordinates.
        r_b: `(q, R)`, the stacked rows of `b`.
        ranks: ranks of the T updates; their sum is R.
    """

    q_a: np.ndarray
    q_b: np.ndarray
    r_a: np.ndarray
    r_b: np.ndarray
    ranks: tuple[int, ...]

    @property
    def parts(self) -> list[Factors]:
        """T pairs of columns `(q, r_i)` and `(p, r_i)`: `updates[i] = left @ right.T`."""
        ends = np.cumsum(self.ranks)[:-1]
        return list(zip(np.split(self.r_b, ends, axis=1), np.split(self.r_a, ends, axis=1)))

    @property
    def updates(self) -> np.ndarray:
        """The updates M_i, `(T, q, p)`, computed anew; for many tasks much larger than `parts`."""
        return np.stack([left @ right.T for left, right in self.parts])

    def weighted_sum(self, weights: np.ndarray) -> np.ndarray:
        """Sum of the updates times `weights (T,)`, `(q, p)`, in one product for all."""
        spread = np.repeat(weights, self.ranks).astype(self.r_b.dtype)
        return (self.r_b * spread) @ self.r_a.T


def to_core(factors: Sequence[Factors]) -> CoreSpace:
    """Move T updates of one module into their common core space; `factorise` leads back.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`, scales folded into b; r_i may be 0.
    """
    q_a, r_a = _qr([a.T for a, _ in factors])
    q_b, r_b = _qr([b for _, b in factors])
    return CoreSpace(q_a, q_b, r_a, r_b, tuple(len(b) for _, b in factors))


def _qr(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    # numpy's QR computes in float64 whatever it is given: three times slower for float32. The
    # transpose of stacked rows is in LAPACK's order and is overwritten: no copy of the stack.
    stack = np.concatenate(rows).T
    return scipy.linalg.qr(stack, mode="economic", overwrite_a=True, check_finite=False)


def factorise(core: np.ndarray, q_a: np.ndarray, q_b: np.ndarray, rank: int) -> Factors:
    """The best factors of `q_b @ core @ q_a.T` with a given rank, see `best_factors`.

    Args:
        core: `(q, p)`.
        q_a: `(in, p)`, orthonormal columns.
        q_b: `(out, q)`, orthonormal columns.
        rank: at least 1.

    Returns:
        `a (in, r)`, `b (r, out)` with r = min(rank, size of the core).
    """
    a, b = best_factors(core, rank)
    return q_a @ a, b @ q_b.T


def best_factors(update: np.ndarray, rank: int) -> Factors:
    """The best factors of an update with a given rank, singular values split evenly.

    No other factors of this rank are closer in Frobenius norm (Eckart-Young).

    The left singular vectors are eigenvectors of the update's Gram matrix, of which only the
    leading ones are computed. In float64 that loses singular values below 1e-8 of the largest,
    less than float32 factors can hold.

    Args:
        update: `(out, in)`.
        rank: at least 1.

    Returns:
        `a (in, r)`, `b (r, out)` with r = min(rank, in, out).
    """
    if update.shape[0] > update.shape[1]:
        b, a = best_factors(update.T, rank)
        return a.T, b.T
    wide = update.astype(np.float64)
    size = len(wide)
    leading = [max(0, size - rank), size - 1]
    _, u = scipy.linalg.eigh(wide @ wide.T, subset_by_index=leading, check_finite=False)
    vt = u.T @ wide
    root = np.sqrt(np.linalg.norm(vt, axis=1))
    vt /= np.where(root > 0, root, 1)[:, None]
    dtype = update.dtype
    return vt.T.astype(dtype), (root[:, None] * u.T).astype(dtype)
