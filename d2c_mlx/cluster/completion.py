"""A loss table of many adapters: measured between similar adapters, estimated everywhere else.

All N adapters on all N tasks are N^2 evaluations, 40,000 for 200 adapters. The table decides which
adapters share a slot, and such adapters are among the most similar in dW. So a task is measured
under those alone. The other regrets are estimated from the averages of the task and the adapter.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from d2c_mlx.cluster.partition import bounded

__all__ = ["completed", "nearest", "others_needed"]


def others_needed(n: int, least: int, n_clusters: int | None = None) -> int:
    """The number of other adapters to measure each task under: twice a slot's share, or `least`.

    Args:
        n: number of adapters.
        least: lower bound of the result, as far as there are adapters.
        n_clusters: number of slots; None if it is not known yet.
    """
    return min(n - 1, max(least, 2 * ceil(n / n_clusters) if n_clusters else 0))


def nearest(similarity: np.ndarray, n_others: int) -> np.ndarray:
    """Choose the pairs to measure: each task under its own adapter and the most similar others.

    Args:
        similarity: `(n, n)` cosines of dW, see `adapters.similarity.similarity`.
        n_others: other adapters per task, see `others_needed`; ties go to the first.

    Returns:
        `(n, n)` bool, True where task i is measured under adapter j.
    """
    alike = similarity.copy()
    np.fill_diagonal(alike, np.inf)
    order = np.argsort(-alike, axis=1, kind="stable")[:, : n_others + 1]
    measured = np.zeros(alike.shape, bool)
    np.put_along_axis(measured, order, True, axis=1)
    return measured


def completed(regrets: np.ndarray) -> np.ndarray:
    """Estimate the regrets that were not measured (NaN).

    An estimate is the sum of a constant, an effect of the task and an effect of the adapter. Ridge
    regression fits them to the measured regrets of tasks under other adapters than their own.

    Args:
        regrets: `(n, n)` normalised regrets, task i under adapter j.

    Returns:
        `(n, n)` without NaN; measured regrets are unchanged.
    """
    missing = np.isnan(regrets)
    if not missing.any():
        return regrets
    from sklearn.linear_model import Ridge

    n, each = len(regrets), np.eye(len(regrets))
    tasks, adapters = np.nonzero(~missing & ~each.astype(bool))
    if not len(tasks):
        return np.where(missing, 1.0, regrets)  # as far as is known, no adapter serves another task
    harm = bounded(regrets[tasks, adapters])
    fit = Ridge().fit(np.hstack([each[tasks], each[adapters]]), harm)
    estimated = fit.intercept_ + fit.coef_[:n, None] + fit.coef_[n:]
    return np.where(missing, estimated, regrets)
