"""Measuring where a new adapter fits, on calibration rows of the tasks that have some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.evaluate.attribution import module_gains
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.evaluate.loss_table import normalized_regret
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.line_search import COARSE_SCALES, FINE_SCALES, line_search

__all__ = ["Judge"]


class Judge:
    """Decides by losses on calibration rows; without a judge, `add_adapter` decides by weights.

    Tasks of the pack without rows do not count.
    """

    def __init__(
        self, base: BaseModel, evaluator: Evaluator, probes: Mapping[str, ExampleSet]
    ) -> None:
        """Judge on a base model.

        Args:
            base: the pack's base model.
            evaluator: evaluates losses on the base model.
            probes: task -> calibration rows; the arriving task must be among them.
        """
        self._base, self._evaluator, self._probes = base, evaluator, probes

    def best(
        self,
        merges: Mapping[str, Adapter],
        slots: Mapping[str, Adapter],
        served: Mapping[str | int, Sequence[str]],
        new: Adapter,
    ) -> tuple[str, Adapter]:
        """Find the merge that costs least, and tune its scale.

        A task's cost is the rise of its loss, as a share of its gain over the base before.

        Args:
            merges: slot -> the slot's adapter with the new one merged in.
            slots: slot -> its adapter before.
            served: slot -> tasks.
            new: the adapter that arrives.

        Returns:
            The slot, and its merge at the best scale.
        """
        found = {
            slot: self._tuned(merge, slots[slot], served[slot], new)
            for slot, merge in merges.items()
        }
        name = min(found, key=lambda slot: (found[slot][0], slot))
        return name, found[name][1]

    def _tuned(
        self, merge: Adapter, slot: Adapter, served: Sequence[str], new: Adapter
    ) -> tuple[float, Adapter]:
        """The cost of a merge at its best scale, and the merge at that scale."""
        tasks = [task for task in served if task in self._probes]
        own = np.concatenate([self._losses(slot, tasks), self._losses(new, [new.name])])
        tasks.append(new.name)
        base = self._losses(None, tasks)

        def cost(scale: float) -> float:
            losses = self._losses(scaled(merge, scale), tasks)
            return float(normalized_regret(losses, own, base).sum())

        scale, lowest = line_search(cost, COARSE_SCALES)
        return lowest, scaled(merge, scale)

    def gains(self, adapter: Adapter) -> dict[str, float]:
        """Contribution of each module of the arriving adapter, in nats, see `module_gains`."""
        return module_gains(self._base, adapter, self._probes[adapter.name])

    def scaled(self, small: Compressed) -> Compressed:
        """The stored form at the first scale from 1 up after which its task's loss rises."""

        def loss(scale: float) -> float:
            adapter = small.scaled(scale).adapter(self._base.dtype)
            return float(self._losses(adapter, [small.name])[0])

        return small.scaled(line_search(loss, FINE_SCALES[FINE_SCALES.index(1.0) :], 1.0)[0])

    def _losses(self, adapter: Adapter | None, tasks: Sequence[str]) -> np.ndarray:
        if not tasks:
            return np.zeros(0)
        return self._evaluator.losses_in_parts([(adapter, [self._probes[t] for t in tasks])])[0]
