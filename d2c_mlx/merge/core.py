"""The core space: merge LoRA updates exactly without forming a dense dW.

Stack the factors of T adapters and take QR: `[a_1 .. a_T] = Q_a R_a`, `[b_1^T .. b_T^T] = Q_b R_b`.
Every `dW_i = Q_b M_i Q_a^T` with a small `M_i`, so any method may work on the M_i. Lossless, for
any mix of ranks. Source: Core Space Merging, https://arxiv.org/abs/2509.17786.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["factorise", "to_core"]

Factors = tuple[np.ndarray, np.ndarray]


def to_core(factors: Sequence[Factors]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Move T updates of one module into their common core space.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`, float32, scales folded into b.

    Returns:
        `(q_a, q_b, cores)` of shapes `(in, p)`, `(out, q)`, `(T, q, p)` with
        `dW_i = q_b @ cores[i] @ q_a.T` and p, q at most the sum of ranks.
    """
    q_a, r_a = np.linalg.qr(np.concatenate([a for a, _ in factors], axis=1))
    q_b, r_b = np.linalg.qr(np.concatenate([b.T for _, b in factors], axis=1))
    ends = np.cumsum([a.shape[1] for a, _ in factors])[:-1]
    parts = zip(np.split(r_b, ends, axis=1), np.split(r_a, ends, axis=1))
    return q_a, q_b, np.stack([left @ right.T for left, right in parts])


def factorise(core: np.ndarray, q_a: np.ndarray, q_b: np.ndarray, rank: int) -> Factors:
    """The best rank-`rank` factors of `q_b @ core @ q_a.T`, singular values split evenly.

    Returns:
        `a (in, r)`, `b (r, out)` with r = min(rank, size of the core). Eckart-Young: no other
        factors of this rank are closer to dW in Frobenius norm.
    """
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    root = np.sqrt(s[:rank])
    a = (q_a @ vt[:rank].T) * root
    b = (root[:, None] * u[:, :rank].T) @ q_b.T
    return a, b
