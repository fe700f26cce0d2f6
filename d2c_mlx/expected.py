"""What tasks lose under an adapter, as their own adapters expect it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.adapter import Adapter
from d2c_mlx.cluster import Problem
from d2c_mlx.distill import Distiller
from d2c_mlx.examples import ExampleSet
from d2c_mlx.model import BaseModel
from d2c_mlx.probe import Evaluator

__all__ = ["Expected"]


class Expected:
    """Regrets by the own adapters' answers to the probes, not by the rows' own.

    KL(own adapter || another) over the gain of `cluster.Problem`: 0 at the own adapter, about 1 at
    the base model. By the rows' answers a scale of 1.7 may look better than the adapter itself, and
    a small form luckier than a large one.

    Attributes:
        sets: the probes; with the own adapters' answers, if there are such.
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
        self.sets = list(probes)
        if separate:
            model = Distiller(base)
            self.sets = [model.taught(*pair) for pair in zip(adapters, probes)]

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
