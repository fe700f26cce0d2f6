"""The calibration losses of every task, and the regrets that they give."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

__all__ = ["LossTable", "normalized_regret"]

# In nats. A smaller gain counts as this much where losses are divided by it.
_LEAST_GAIN = 0.05
# A lower regret counts as this much.
_LEAST_REGRET = -1.0


def normalized_regret(losses: np.ndarray, own: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Bring losses to a scale that tasks share: 0 at the task adapter, 1 at the base model.

    A gain counts as at least 0.05 nats, so that an adapter that hardly helps does not outvote the
    others. A regret is at least -1: an adapter worse than the base model would outvote them too,
    since any merge that undoes it is many such gains better. Use `LossTable.regret` where there is
    a table.

    Args:
        losses: `(n_tasks,)` or `(n_tasks, k)`, in nats per target token.
        own: `(n_tasks,)` losses under the task adapters, in the same unit.
        base: `(n_tasks,)` losses under the bare base model, in the same unit.

    Returns:
        Regrets in the shape of `losses`, without a unit.
    """
    wide = (slice(None),) + (None,) * (losses.ndim - 1)
    regrets = (losses - own[wide]) / np.maximum(base - own, _LEAST_GAIN)[wide]
    return np.maximum(regrets, _LEAST_REGRET)


@dataclass(frozen=True)
class LossTable:
    """Mean NLL per target token, in nats, on the tasks' calibration rows.

    It is pure data: it converts losses to regrets and measures nothing. `measure_losses` of
    merge/library.py makes one.

    Attributes:
        tasks: task names.
        individual: `(n_tasks,)` losses of each task under its task adapter.
        base: `(n_tasks,)` losses under the bare base model.
        strengths: `(s,)` factors on dW at which task adapters were measured, rising; may be empty.
        weakened: `(n_tasks, s)` losses of each task under its task adapter at these strengths.
    """

    tasks: tuple[str, ...]
    individual: np.ndarray
    base: np.ndarray
    strengths: tuple[float, ...] = ()
    weakened: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @cached_property
    def gain(self) -> np.ndarray:
        """`(n_tasks,)` nats that each task adapter gains over the base model, at least 0.05."""
        return np.maximum(self.base - self.individual, _LEAST_GAIN)

    def regret(self, losses: np.ndarray, tasks: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Convert losses to regrets by `normalized_regret`, with this table's losses at 0 and 1.

        Args:
            losses: `(n,)` or `(n, k)`, in nats per target token.
            tasks: `(n,)` indices of the tasks of the rows.

        Returns:
            Regrets in the shape of `losses`.
        """
        return normalized_regret(losses, self.individual[tasks], self.base[tasks])

    def to_json(self) -> dict[str, object]:
        """The content of `losses.json`."""
        return {
            "unit": "mean NLL per target token (nats)",
            "tasks": list(self.tasks),
            "individual": self.individual.tolist(),
            "base": self.base.tolist(),
            "strengths": list(self.strengths),
            "weakened": self.weakened.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, list]) -> LossTable:
        """Make a table from the content that `to_json` gave."""
        return cls(
            tuple(data["tasks"]),
            np.array(data["individual"]),
            np.array(data["base"]),
            tuple(data["strengths"]),
            np.array(data["weakened"]).reshape(len(data["tasks"]), -1),
        )
