"""What tasks lose under an adapter, judged by the answers of their own adapters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.distill import Distiller, TeacherRow
from d2c_mlx.evaluate.loss_table import LossTable
from d2c_mlx.merge.library import Library
from d2c_mlx.merge.methods import scaled

__all__ = ["TeacherRegret", "shrinkage"]

# The strength at which an adapter is asked whether it is right: far enough for a loss to move.
_WEAKER = 0.8


class TeacherRegret:
    """Regrets by the task adapters' answers to the calibration rows, and by the rows' own.

    KL(task adapter || another) over the gain: 0 at the task adapter, about 1 at the base model. By
    the answers of ten rows alone a scale of 1.7 may look better than the adapter itself, and a
    small form luckier than a large one. An adapter that really is better weaker or stronger shows
    it in the same direction on nearly all rows: then the rows' own answers count too.

    Use it to judge stored forms of adapters; clusterings are judged by `LossTable.regret`.

    Attributes:
        sets: the calibration rows, with the task adapters' answers where the model allows it.
        trust: of each task, the weight of the rows' own answers, see `shrinkage`.
    """

    def __init__(self, library: Library, losses: LossTable) -> None:
        """Ask every adapter for its answers.

        Where logits are scaled or capped (see `Distiller`), regrets are those of the rows' own
        answers.

        Args:
            library: adapters and rows.
            losses: has the gains.
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
        """Normalised regrets `(n,)` of losses `(n,)`, in nats, on the sets of `tasks`."""
        if self._separate:
            return losses / self._losses.gain[tasks]
        return self._losses.regret(losses, tasks)

    def under(self, adapter: Adapter | None, tasks: Sequence[int]) -> np.ndarray:
        """Normalised regrets `(n_tasks,)` under an adapter, None for the bare base model."""
        sets = [self.sets[i] for i in tasks]
        (losses,) = self._evaluator.losses_in_parts([(adapter, sets)])
        return self.regret(losses, np.array(tasks))


def _trust(model: Distiller, adapter: Adapter, rows: Sequence[TeacherRow]) -> float:
    """Of the rows' own answers, by what they say of the adapter, their teacher, made weaker."""
    rises = model.compare(scaled(adapter, _WEAKER), rows)
    # Both rise alike, luck apart, if the rows are answered as the adapter expects.
    return shrinkage(rises[:, 0] - rises[:, 1], [row.example.n_targets for row in rows])


def shrinkage(shifts: np.ndarray, n_targets: Sequence[int]) -> float:
    """The share of a mean that is left when what may be luck is taken from its square.

    `max(0, 1 - (half-width of the 95 % confidence interval / mean) ** 2)`: 0 unless the mean is
    beyond what luck does. The shrinkage of James and Stein (1961, positive part), with Student's t
    for few rows.

    Args:
        shifts: `(n_rows,)`, sums over the targets of a row.
        n_targets: `(n_rows,)`; the mean is that per target.
    """
    from scipy.special import stdtrit

    n, sizes = len(shifts), np.asarray(n_targets)
    mean = float(shifts.sum() / sizes.sum())
    if n < 2 or mean == 0:
        return 0.0
    # Of a ratio of sums, rows drawn at random.
    variance = n / (n - 1) * float(((shifts - mean * sizes) ** 2).sum()) / int(sizes.sum()) ** 2
    return max(0.0, 1 - float(stdtrit(n - 1, 0.975)) ** 2 * variance / mean**2)
