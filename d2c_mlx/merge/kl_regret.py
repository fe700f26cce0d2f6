"""What tasks lose under an adapter, as their own adapters expect it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.cluster.partition import Problem
from d2c_mlx.evaluate.distill import Distiller, Row
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet

__all__ = ["Expected", "shrinkage"]

# The strength at which an adapter is asked whether it is right: far enough for a loss to move.
_WEAKER = 0.8


class Expected:
    """Regrets by the own adapters' answers to the probes, and by the rows' own as far as is safe.

    KL(own adapter || another) over the gain of `cluster.Problem`: 0 at the own adapter, about 1 at
    the base model. By the answers of ten rows alone a scale of 1.7 may look better than the adapter
    itself, and a small form luckier than a large one. But an adapter that is better weaker or
    stronger than it is shows it in the same direction on nearly all rows: then they have a say.

    Attributes:
        sets: the probes; with the own adapters' answers, if there are such.
        trust: of each task, the weight of the rows' own answers, see `shrinkage`.
    """

    def __init__(
        self,
        base: BaseModel,
        evaluator: Evaluator,
        adapters: Sequence[Adapter],
        probes: Sequence[ExampleSet],
        problem: Problem,
        separate: bool,
    ) -> None:
        """Ask every adapter for its answers.

        Args:
            base: the model.
            evaluator: of losses on it.
            adapters: one per task.
            probes: one per adapter.
            problem: has the gains.
            separate: whether logits are a head's of hidden states. Where they are scaled or capped
                (see `Distiller`), regrets are those of the probes' own answers.
        """
        self._evaluator, self._problem, self._separate = evaluator, problem, separate
        self.sets, self.trust = list(probes), [0.0] * len(probes)
        if separate:
            model = Distiller(base)
            for i, (adapter, probe) in enumerate(zip(adapters, probes)):
                rows = model.teach(adapter, probe)
                self.trust[i] = trust = _trust(model, adapter, rows)
                self.sets[i] = model.taught(adapter, probe, trust, None if trust else rows)

    def regret(self, losses: np.ndarray, tasks: np.ndarray) -> np.ndarray:
        """Normalised regrets `(n,)` of losses `(n,)` on the sets of `tasks`."""
        if self._separate:
            return losses / self._problem.gain[tasks]
        return self._problem.regret(losses, tasks)

    def under(self, adapter: Adapter | None, tasks: Sequence[int]) -> np.ndarray:
        """Normalised regrets `(n_tasks,)` under an adapter, None for the bare base model."""
        sets = [self.sets[i] for i in tasks]
        (losses,) = self._evaluator.losses_in_parts([(adapter, sets)])
        return self.regret(losses, np.array(tasks))


def _trust(model: Distiller, adapter: Adapter, rows: Sequence[Row]) -> float:
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
