"""Regrets of tasks under an adapter, by the answers of their task adapters or by weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.similarity import errors_and_kept
from d2c_mlx.evaluate.distill import Distiller, TeacherRow
from d2c_mlx.evaluate.loss_table import LossTable, normalized_regret
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.examples import ExampleSet

__all__ = ["StoredRegret", "TeacherRegret", "WeightRegret", "shrinkage"]

# Scale at which a task adapter is compared with itself: far enough from 1 for a loss to move.
_WEAKER = 0.8


class StoredRegret(Protocol):
    """Judges stored forms of adapters: what a planner needs of the two below."""

    sets: list[ExampleSet]
    trust: list[float]

    def under(self, adapter: Adapter | None, tasks: Sequence[int]) -> np.ndarray:
        """`(n_tasks,)` normalised regrets of tasks under an adapter; None is the base model."""


class TeacherRegret:
    """Regrets on calibration rows, by teacher targets and partly by the rows' own answers.

    Use it to judge stored forms of adapters; clusterings are judged by `LossTable.regret`.

    A regret is KL(task adapter || another) over the gain: 0 at the task adapter, about 1 at the
    base model, at least -1. On ten rows their answers alone may favour a scale of 1.7 over the
    adapter itself, or a small form over a large one, by luck. A real scale error moves nearly all
    rows the same way, and then the rows' own answers count too.

    Attributes:
        sets: the calibration rows, with teacher targets where the model allows it.
        trust: weight of the rows' own answers for each task, 0 to 1, see `shrinkage`.
    """

    def __init__(self, library: Library, losses: LossTable) -> None:
        """Compute the teacher targets of every task adapter.

        Where logits are scaled or capped (see `Distiller`), regrets use the rows' own answers.

        Args:
            library: adapters and calibration rows.
            losses: the table that has the gains, in nats.
        """
        self._evaluator, self._losses = library.evaluator, losses
        self._separate = library.engine.float32_head is not None
        self.sets, self.trust = list(library.probes), [0.0] * len(library.probes)
        if self._separate:
            model = Distiller(library.base)
            for i, (adapter, probe) in enumerate(zip(library.adapters, library.probes)):
                rows = model.teacher_rows(adapter, probe)
                self.trust[i] = trust = _trust(model, adapter, rows)
                self.sets[i] = model.with_teacher(adapter, probe, trust, None if trust else rows)

    def regret(self, losses: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Convert losses to regrets.

        Args:
            losses: `(n,)`, in nats per target token, measured on `sets`.
            tasks: `(n,)` indices of their tasks.

        Returns:
            `(n,)` normalised regrets.
        """
        if self._separate:
            # They are differences from the task adapter's already.
            gain = self._losses.gain[tasks]
            return normalized_regret(losses, np.zeros_like(gain), gain)
        return self._losses.regret(losses, tasks)

    def under(self, adapter: Adapter | None, tasks: Sequence[int]) -> np.ndarray:
        """Measure the regrets of tasks under an adapter.

        Args:
            adapter: the adapter; None is the bare base model.
            tasks: indices of the tasks.

        Returns:
            `(n_tasks,)` normalised regrets.
        """
        sets = [self.sets[i] for i in tasks]
        (losses,) = self._evaluator.losses_in_parts([(adapter, sets)])
        return self.regret(losses, np.array(tasks))


class WeightRegret:
    """Regrets where there are no rows: the squared relative error of dW, see `errors_and_kept`.

    It is 0 at the task adapter and 1 at the base model, as that of `TeacherRegret` is.

    Attributes:
        sets: calibration rows, of which there are none.
        trust: their weights, 0 for each task.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Judge by these task adapters."""
        self._adapters = adapters
        self.sets: list[ExampleSet] = []
        self.trust = [0.0] * len(adapters)

    def under(self, adapter: Adapter | None, tasks: Sequence[int]) -> np.ndarray:
        """See `StoredRegret`; nothing is measured."""
        return np.array([errors_and_kept(self._adapters[i], adapter)[0] for i in tasks])


def _trust(model: Distiller, adapter: Adapter, rows: Sequence[TeacherRow]) -> float:
    """The weight of the rows' own answers, from their losses under the adapter made weaker."""
    rises = model.compare(scaled(adapter, _WEAKER), rows)
    # If the rows' answers are what the adapter expects, both losses rise alike, up to luck.
    return shrinkage(rises[:, 0] - rises[:, 1], [row.example.n_targets for row in rows])


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
