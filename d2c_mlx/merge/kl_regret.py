"""Calibration rows with the predictions of their task adapters as targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.distill import Distiller
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet

__all__ = ["shrinkage", "teacher_targets"]

# Scale at which a task adapter is compared with itself: far enough from 1 for a loss to move.
_WEAKER = 0.8


def teacher_targets(
    base: BaseModel, adapters: Sequence[Adapter], rows: Sequence[ExampleSet]
) -> tuple[list[ExampleSet], list[float]]:
    """Give rows their task adapters' predictions as targets, and partly their own answers.

    Args:
        base: the base model, whose head is linear; the last adapter stays attached.
        adapters: one per task.
        rows: calibration rows of every task.

    Returns:
        The rows with targets, on which a loss is a divergence from the task adapter in nats, and
        the weight of their own answers in it for each task, 0 to 1, see `shrinkage`.
    """
    model, sets, trust = Distiller(base), [], []
    for adapter, own in zip(adapters, rows):
        targets = model.teacher_rows(adapter, own)
        rises = model.compare(scaled(adapter, _WEAKER), targets)
        # If the rows' answers are what the adapter expects, both losses rise alike, up to luck.
        n_targets = [row.example.n_targets for row in targets]
        weight = shrinkage(rises[:, 0] - rises[:, 1], n_targets)
        sets.append(model.with_teacher(adapter, own, weight, None if weight else targets))
        trust.append(weight)
    return sets, trust


def shrinkage(shifts: np.ndarray, n_targets: Sequence[int]) -> float:
    """The factor that shrinks a mean towards 0 by its uncertainty.

    `max(0, 1 - (half-width of the 95 % confidence interval / mean) ** 2)`: 0 unless the mean is
    significant. It is the shrinkage of James and Stein (1961, positive part), with Student's t for
    few rows.

    Args:
        shifts: `(n_rows,)` sums over the targets of a row, in nats.
        n_targets: `(n_rows,)` numbers of targets; the mean is per target.

    Returns:
        The factor, from 0 (the mean may be luck) to 1.
    """
    from scipy.special import stdtrit

    n, sizes = len(shifts), np.asarray(n_targets)
    mean = float(shifts.sum()) / float(sizes.sum())
    if n < 2 or mean == 0:
        return 0.0
    # The variance of a ratio of sums over rows drawn at random.
    variance = n / (n - 1) * float(((shifts - mean * sizes) ** 2).sum()) / int(sizes.sum()) ** 2
    return max(0.0, 1 - float(stdtrit(n - 1, 0.975)) ** 2 * variance / mean**2)
