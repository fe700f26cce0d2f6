"""Merges entry by entry: the mean, and sign election (TIES).

Updates are `(T, q, p)` in core space, a result is `(q, p)`. Entries depend on the basis. In the
papers it is the model's; here it is the QR of the stacked factors, adapters in their order.
"""

from __future__ import annotations

import numpy as np

from d2c_mlx.adapters.core_space import CoreSpace

__all__ = ["elected_signs", "linear", "ties", "trim"]

# As a share of the largest entry. Smaller sums are rounding errors of float32.
_CANCELLED = 1e-6


def linear(space: CoreSpace, weights: np.ndarray) -> np.ndarray:
    """Add the updates up, weighted by `weights (T,)`; the mean for weights 1 / T.

    It is the reference for all other methods.

    Returns:
        `(q, p)`.

    Source: task arithmetic, https://arxiv.org/abs/2212.04089.
    """
    return space.weighted_sum(weights)


def ties(updates: np.ndarray, density: float) -> np.ndarray:
    """Trim every update, elect a sign per entry, and average the entries that agree with it.

    Use it when tasks pull in opposite directions. Equal updates merge to the trimmed update, at
    density 1 to themselves.

    Args:
        updates: `(T, q, p)`.
        density: share of entries kept.

    Returns:
        `(q, p)`.

    Source: TIES-Merging, https://arxiv.org/abs/2306.01708, on core entries as in
    https://arxiv.org/abs/2509.17786.
    """
    trimmed = trim(updates, density)
    signs = elected_signs(trimmed)
    agree = (np.sign(trimmed) == signs) & (signs != 0)
    count = np.maximum(agree.sum(axis=0), 1).astype(trimmed.dtype)
    return np.where(agree, trimmed, 0).sum(axis=0) / count


def elected_signs(updates: np.ndarray) -> np.ndarray:
    """`(q, p)` signs of the sums over the updates; 0 where they cancel up to rounding."""
    total = updates.sum(axis=0)
    return np.where(np.abs(total) > _CANCELLED * np.abs(updates).max(), np.sign(total), 0)


def trim(updates: np.ndarray, density: float) -> np.ndarray:
    """Keep the largest entries of every update by magnitude, at least one; ties are all kept.

    Args:
        updates: `(T, q, p)`.
        density: share of entries kept.

    Source: TIES-Merging, https://arxiv.org/abs/2306.01708 (there over all modules at once).
    """
    flat = np.abs(updates).reshape(len(updates), -1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = np.partition(flat, -keep, axis=1)[:, -keep]
    return np.where(np.abs(updates) >= threshold[:, None, None], updates, 0)
