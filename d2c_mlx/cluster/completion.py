"""A probe table of many adapters: measured where two are alike, expected everywhere else.

All N adapters on all N tasks are N^2 evaluations, 40,000 for 200 adapters. The table says which
adapters may share a slot, and these are among the most alike in dW: so a task is measured under
those alone. What is expected of the others is what the task and the adapter do on average.
"""

from __future__ import annotations

from math import ceil

import numpy as np

from d2c_mlx.cluster.partition import bounded

__all__ = ["completed", "nearest", "others_needed"]


def others_needed(n: int, least: int, n_clusters: int | None = None) -> int:
    """Under how many other adapters a task is measured: twice as many as share a slot, or `least`.

    Args:
        n: number of adapters.
        least: at least so many, if there are.
        n_clusters: slots for them; None if that is not known yet.
    """
    return min(n - 1, max(least, 2 * ceil(n / n_clusters) if n_clusters else 0))


def nearest(similarity: np.ndarray, n_others: int) -> np.ndarray:
    """`(n, n)` bool: task i is measured under adapter j, its own or one of the most alike.

    Args:
        similarity: `(n, n)` cosines of dW, see `features.similarity`.
        n_others: of a task; ties go to the first.
    """
    alike = similarity.copy()
    np.fill_diagonal(alike, np.inf)
    order = np.argsort(-alike, axis=1, kind="stable")[:, : n_others + 1]
    measured = np.zeros(alike.shape, bool)
    np.put_along_axis(measured, order, True, axis=1)
    return measured


def completed(regrets: np.ndarray) -> np.ndarray:
    """Estimate the regrets that were not measured (NaN).

    A regret is estimated as a constant, plus what the task adds, plus what the adapter adds: ridge
    regression on those that were measured, of tasks under other adapters than their own.

    Args:
        regrets: `(n, n)`, task i under adapter j.
    """
    missing = np.isnan(regrets)
    if not missing.any():
        return regrets
    from sklearn.linear_model import Ridge

    n, each = len(regrets), np.eye(len(regrets))
    tasks, adapters = np.nonzero(~missing & ~each.astype(bool))
    harm = bounded(regrets[tasks, adapters])
    fit = Ridge().fit(np.hstack([each[tasks], each[adapters]]), harm)
    estimated = fit.intercept_ + fit.coef_[:n, None] + fit.coef_[n:]
    return np.where(missing, estimated, regrets)
