"""Which entries of each update take part in a merge: `(T, q, p) -> (T, q, p)`.

`density` is the share of entries kept, above 0 and at most 1.
"""

from __future__ import annotations

import numpy as np

__all__ = ["drop", "trim"]


def trim(updates: np.ndarray, density: float) -> np.ndarray:
    """Keep the largest entries by magnitude of every update, at least one; ties are all kept.

    Source: TIES-Merging, https://arxiv.org/abs/2306.01708 (there over all modules at once).
    """
    flat = np.abs(updates).reshape(len(updates), -1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = np.partition(flat, -keep, axis=1)[:, -keep]
    return np.where(np.abs(updates) >= threshold[:, None, None], updates, 0)


def drop(updates: np.ndarray, density: float, seed: int) -> np.ndarray:
    """Keep entries at random and divide by `density`: the expectation is the update itself.

    Source: DARE, https://arxiv.org/abs/2311.03099.
    """
    keep = np.random.default_rng(seed).random(updates.shape) < density
    return np.where(keep, updates / updates.dtype.type(density), 0)
