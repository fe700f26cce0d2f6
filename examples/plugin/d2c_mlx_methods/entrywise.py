"""Merges entry by entry: DARE, alone and before the sign election of TIES, and EMR.

Updates are `(T, q, p)` in core space, a result is `(q, p)`. Entries depend on the basis. In the
papers it is the model's; here it is the QR of the stacked factors, adapters in their order.
"""

from __future__ import annotations

import numpy as np

from d2c_mlx.merge.combine import elected_signs, ties

__all__ = ["dare_linear", "dare_ties", "drop", "emr"]


def dare_linear(updates: np.ndarray, density: float, seed: int) -> np.ndarray:
    """Drop entries at random, rescale the rest and average: in expectation the mean of the updates.

    Use it to compare; it adds noise to `linear`. Equal updates merge to themselves only in
    expectation, or at density 1.

    Args:
        updates: `(T, q, p)`.
        density: share of entries kept.
        seed: seed of the draws.

    Returns:
        `(q, p)`.

    Source: DARE, https://arxiv.org/abs/2311.03099, here on core entries.
    """
    return drop(updates, density, seed).mean(axis=0)


def dare_ties(updates: np.ndarray, density: float, seed: int) -> np.ndarray:
    """Drop entries at random and rescale the rest, then merge them as `ties` does untrimmed.

    Use it to compare, at a density of 0.5 or more. Equal updates merge to themselves divided by
    `density` wherever any copy kept the entry. Arguments and result are those of `dare_linear`.

    Source: DARE, https://arxiv.org/abs/2311.03099, with the merge of
    https://arxiv.org/abs/2306.01708, here on core entries.
    """
    return ties(drop(updates, density, seed), density=1.0)


def emr(updates: np.ndarray) -> np.ndarray:
    """Make the unified update: the elected sign with the largest magnitude that agrees with it.

    Use it to compare. In the paper every task keeps a mask and a rescaler that recover its own
    update. They cost bytes per task and no runtime applies them, so they are not made. Alone the
    unified update is larger than any single one. Equal updates merge to themselves.

    Args:
        updates: `(T, q, p)`.

    Returns:
        `(q, p)`.

    Source: EMR-Merging, https://arxiv.org/abs/2405.17461, here on core entries.
    """
    signs = elected_signs(updates)
    agree = (np.sign(updates) == signs) & (signs != 0)
    return signs * np.where(agree, np.abs(updates), 0).max(axis=0)


def drop(updates: np.ndarray, density: float, seed: int) -> np.ndarray:
    """Keep entries at random and divide them by `density`; the expectation is the update itself.

    Args:
        updates: `(T, q, p)`.
        density: probability of keeping an entry.
        seed: seed of the draws.

    Source: DARE, https://arxiv.org/abs/2311.03099.
    """
    keep = np.random.default_rng(seed).random(updates.shape) < density
    return np.where(keep, updates / updates.dtype.type(density), 0)
