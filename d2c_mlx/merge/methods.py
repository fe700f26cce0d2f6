"""Merge methods: pure functions on the cores of one module, `(T, q, p) -> (q, p)`."""

from __future__ import annotations

import numpy as np

__all__ = ["linear", "ties"]


def linear(cores: np.ndarray, density: float = 1.0) -> np.ndarray:
    """Mean of the updates. `density` is not used.

    Source: task arithmetic, https://arxiv.org/abs/2212.04089, with weights 1/T; a scale follows.
    """
    return cores.mean(axis=0)


def ties(cores: np.ndarray, density: float = 0.5) -> np.ndarray:
    """Trim, elect sign, mean of the agreeing entries.

    Args:
        cores: `(T, q, p)`.
        density: share of entries kept per update, the largest by magnitude.

    Source: TIES-Merging, https://arxiv.org/abs/2306.01708, here on core entries as in
    https://arxiv.org/abs/2509.17786.
    """
    flat = np.abs(cores).reshape(len(cores), -1)
    keep = max(1, round(density * flat.shape[1]))
    threshold = np.partition(flat, -keep, axis=1)[:, -keep]
    trimmed = np.where(np.abs(cores) >= threshold[:, None, None], cores, 0)
    sign = np.sign(trimmed.sum(axis=0))
    agree = (np.sign(trimmed) == sign) & (sign != 0)
    count = np.maximum(agree.sum(axis=0), 1)
    return np.where(agree, trimmed, 0).sum(axis=0) / count
