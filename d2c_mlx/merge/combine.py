"""Merges entry by entry: mean, sign election (TIES), both after DARE, and EMR.

Updates are `(T, q, p)` in core space, a result is `(q, p)`. Entries depend on the basis (as they
do in the papers, where it is the model's): the QR of the stacked factors, adapters in their order.
"""

from __future__ import annotations

import numpy as np

from d2c_mlx.merge.core import CoreSpace
from d2c_mlx.merge.sparsify import drop, trim

__all__ = ["dare_linear", "dare_ties", "emr", "emr_modulators", "linear", "ties"]


def linear(space: CoreSpace, weights: np.ndarray) -> np.ndarray:
    """Weighted sum `(q, p)` of the updates, `weights (T,)`.

    Source: task arithmetic, https://arxiv.org/abs/2212.04089.
    """
    return space.weighted_sum(weights)


def ties(updates: np.ndarray, density: float) -> np.ndarray:
    """Trim, elect signs, mean of the entries that agree.

    Equal updates merge to the trimmed update, at density 1 to themselves.

    Source: TIES-Merging, https://arxiv.org/abs/2306.01708, on core entries as in
    https://arxiv.org/abs/2509.17786.
    """
    return _agreeing_mean(trim(updates, density))


def dare_linear(updates: np.ndarray, density: float, seed: int) -> np.ndarray:
    """Drop entries at random, rescale, mean: in expectation the mean of the updates.

    Equal updates merge to themselves only in expectation, or at density 1.

    Source: DARE, https://arxiv.org/abs/2311.03099, here on core entries.
    """
    return drop(updates, density, seed).mean(axis=0)


def dare_ties(updates: np.ndarray, density: float, seed: int) -> np.ndarray:
    """Drop entries at random, rescale, elect signs, mean of the entries that agree.

    Equal updates merge to themselves divided by `density` wherever any copy kept the entry.

    Source: DARE, https://arxiv.org/abs/2311.03099, with the merge of
    https://arxiv.org/abs/2306.01708, here on core entries.
    """
    return _agreeing_mean(drop(updates, density, seed))


def emr(updates: np.ndarray) -> np.ndarray:
    """The unified update: elected sign, largest magnitude of the entries that agree.

    It is made to be used with `emr_modulators`; alone it is larger than any single update. Equal
    updates merge to themselves.

    Source: EMR-Merging, https://arxiv.org/abs/2405.17461, here on core entries.
    """
    return np.sign(updates.sum(axis=0)) * np.where(_agree(updates), np.abs(updates), 0).max(axis=0)


def emr_modulators(updates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What turns `emr`'s update back into every task's: `rescalers[i] * masks[i] * emr(updates)`.

    They are no part of a merged adapter: an own adapter per task, or one bit per core entry and
    one float per module and task beside the unified one, which a budget has to count.

    Args:
        updates: `(T, q, p)`.

    Returns:
        masks `(T, q, p)`, bool: where the task agrees with the elected sign; rescalers `(T,)`:
        what gives the masked update the task's own sum of magnitudes (0 for a zero update).

    Source: EMR-Merging, https://arxiv.org/abs/2405.17461 (there one rescaler for all modules).
    """
    unified = emr(updates)
    masks = updates * unified > 0
    kept = np.where(masks, np.abs(unified), 0).sum(axis=(1, 2))
    own = np.abs(updates).sum(axis=(1, 2))
    return masks, own / np.where(kept > 0, kept, 1) * (kept > 0)


def _agree(updates: np.ndarray) -> np.ndarray:
    """`(T, q, p)`, bool: entries with the sign of the sum over the updates."""
    sign = np.sign(updates.sum(axis=0))
    return (np.sign(updates) == sign) & (sign != 0)


def _agreeing_mean(updates: np.ndarray) -> np.ndarray:
    agree = _agree(updates)
    count = np.maximum(agree.sum(axis=0), 1).astype(updates.dtype)
    return np.where(agree, updates, 0).sum(axis=0) / count
