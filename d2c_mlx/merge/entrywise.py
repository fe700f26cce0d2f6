"""Merges entry by entry: mean, sign election (TIES), both after DARE, and EMR.

Updates are `(T, q, p)` in core space, a result is `(q, p)`. Entries depend on the basis. In the
papers it is the model's; here it is the QR of the stacked factors, adapters in their order.
"""

from __future__ import annotations

import numpy as np

from d2c_mlx.adapters.core_space import CoreSpace

__all__ = ["dare_linear", "dare_ties", "drop", "emr", "linear", "ties", "trim"]

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
    return _agreeing_mean(trim(updates, density))


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
    """Drop entries at random and rescale the rest, then merge them as `ties` does.

    Use it to compare, at a density of 0.5 or more. Equal updates merge to themselves divided by
    `density` wherever any copy kept the entry. Arguments and result are those of `dare_linear`.

    Source: DARE, https://arxiv.org/abs/2311.03099, with the merge of
    https://arxiv.org/abs/2306.01708, here on core entries.
    """
    return _agreeing_mean(drop(updates, density, seed))


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
    return _elected(updates) * np.where(_agree(updates), np.abs(updates), 0).max(axis=0)


def _agree(updates: np.ndarray) -> np.ndarray:
    """`(T, q, p)` bool: True for entries with the sign of the sum over the updates."""
    sign = _elected(updates)
    return (np.sign(updates) == sign) & (sign != 0)


def _elected(updates: np.ndarray) -> np.ndarray:
    """`(q, p)` signs of the sums over the updates; 0 where they cancel up to rounding."""
    total = updates.sum(axis=0)
    return np.where(np.abs(total) > _CANCELLED * np.abs(updates).max(), np.sign(total), 0)


def _agreeing_mean(updates: np.ndarray) -> np.ndarray:
    agree = _agree(updates)
    count = np.maximum(agree.sum(axis=0), 1).astype(updates.dtype)
    return np.where(agree, updates, 0).sum(axis=0) / count


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
