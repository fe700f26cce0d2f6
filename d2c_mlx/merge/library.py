"""A library: task adapters of one base model, their rows, and how well anything serves a task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle
from typing import Any, Self

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.core_space import errors_and_kept, similarity
from d2c_mlx.adapters.tensor_file import Spool
from d2c_mlx.cluster.partition import Fading
from d2c_mlx.cluster.search import STRENGTHS
from d2c_mlx.evaluate.distill import Distiller, OutputSketch, module_gains, output_sketch
from d2c_mlx.evaluate.scorer import Job, LossTable, Scorer
from d2c_mlx.evaluate.workers import ByteCache
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.models.tasks import Task

# The regret of a weakened adapter without rows: medians over 24 real ones.
_FADED = (0.72, 0.25)
# Rows of a task whose derivatives are sketched, the scale of its adapter, and rows of the sketch.
_SKETCHED, _HALF, _SKETCH = 4, 0.5, 32
# Scale at which a task adapter is compared with itself: far enough from 1 for a loss to move.
_WEAKER = 0.8


@dataclass(frozen=True)
class Library:
    """Task adapters, in an order that every table has, and what measures them.

    `measured` adds losses on the rows, which regrets need. `Library(adapters, (), scorer)` has
    weights alone: errors of dW stand for losses.

    Attributes:
        adapters: one per task.
        tasks: their rows, in the same order; empty where weights alone decide.
        scorer: evaluates losses on the base model.
        losses: losses of the task adapters on the calibration rows; None before they are measured,
            and without rows.
        trust: weight of the rows' own answers in each task's losses, see `by_teacher`.
        planned: True if merges are compared with stored forms, see `by_teacher`.
    """

    adapters: Sequence[Adapter]
    tasks: Sequence[Task]
    scorer: Scorer
    losses: LossTable | None = None
    trust: Sequence[float] = ()
    planned: bool = False

    def measured(self, losses: LossTable) -> Self:
        """The same library with its losses, see `measure_losses`."""
        return replace(self, losses=losses)

    @property
    def base(self) -> Model:
        """The base model of all adapters."""
        return self.scorer.engine.base

    @property
    def names(self) -> list[str]:
        """Names of the adapters, which are also the names of the tasks."""
        return [adapter.name for adapter in self.adapters]

    @property
    def calibration(self) -> list[ExampleSet]:
        """The calibration rows of every task."""
        return [task.calibration for task in self.tasks]

    @property
    def held_out(self) -> list[ExampleSet]:
        """The held-out rows of every task."""
        return [task.held_out for task in self.tasks]

    @cached_property
    def similarity(self) -> np.ndarray:
        """`(n, n)` cosines of the adapters' dW."""
        return similarity(self.adapters)

    @property
    def fading(self) -> Fading:
        """Regrets of tasks under their own adapter made weaker, for estimates."""
        if self.losses:
            return Fading(self.losses.strengths, self.losses.regret(self.losses.weakened))
        # Orthogonal updates: a mean of m is off by 1 - 1 / m, where `MergeEstimates` has m ** -0.5.
        faded = 1 - np.array(STRENGTHS) ** 2 if self.planned else np.array(_FADED)
        return Fading(STRENGTHS, np.tile(faded, (len(self.adapters), 1)))

    def regrets(self, adapter: Adapter | None, tasks: Sequence[int]) -> np.ndarray:
        """`(n_tasks,)` normalised regrets of tasks, by index, under an adapter; None is the base.

        A regret is 0 at the task adapter and 1 at the base model, at least -1. Without rows it is
        the squared relative error of dW.
        """
        return self.regrets_of([(adapter, tasks)], in_parts=True)[0]

    def regrets_of(
        self, jobs: Sequence[tuple[Adapter | None, Sequence[int]]], in_parts: bool = False
    ) -> list[np.ndarray]:
        """`regrets` of many adapters, each on its tasks; `in_parts` is that of `Scorer.losses`."""
        if not (table := self.losses):
            return [
                np.array([errors_and_kept(self.adapters[i], adapter)[0] for i in tasks])
                for adapter, tasks in jobs
            ]
        sets = [(adapter, [self.tasks[i].calibration for i in tasks]) for adapter, tasks in jobs]
        losses = self.scorer.losses(sets, in_parts)
        return [table.regret(x, np.array(tasks, int)) for x, (_, tasks) in zip(losses, jobs)]

    @cached_property
    def by_teacher(self) -> Self:
        """This library, judged by what its task adapters predict in place of the rows' answers.

        Use it for stored forms of adapters, and for merges that are compared with them; clusterings
        are judged by the answers, which on ten rows may favour a scale of 1.7 over the adapter
        itself by luck. A regret is KL(task adapter || another) over the gain. A real scale error
        moves nearly all rows the same way, and then the rows' own answers count too, by `trust`.
        Where logits are scaled or capped, and without rows, all is judged as before.
        """
        if not self.losses or self.scorer.engine.float32_head is None:
            tasks = [replace(task, extra=None) for task in self.tasks]
            return replace(self, tasks=tasks, trust=[0.0] * len(self.adapters), planned=True)
        model, tasks, trust = Distiller(self.base), [], []
        for adapter, task in zip(self.adapters, self.tasks):
            rows = model.teacher_rows(adapter, task.calibration)
            rises = model.compare(scaled(adapter, _WEAKER), rows)
            # If the rows' answers are what the adapter expects, both losses rise alike, up to luck.
            n_targets = [row.example.n_targets for row in rows]
            weight = shrinkage(rises[:, 0] - rises[:, 1], n_targets)
            taught = model.with_teacher(adapter, task.calibration, weight, None if weight else rows)
            tasks.append(replace(task, calibration=taught, extra=None))
            trust.append(weight)
        # The losses are differences from the task adapter's already.
        gain = self.losses.gain
        losses = replace(self.losses, individual=np.zeros_like(gain), base=gain)
        return replace(self, tasks=tasks, losses=losses, trust=trust, planned=True)

    @cached_property
    def module_gains(self) -> list[dict[str, float]]:
        """The gain of every module of each adapter on its calibration rows, in nats; else 1."""
        if not self.tasks:
            return [dict.fromkeys(adapter.modules, 1.0) for adapter in self.adapters]
        # A pass forwards and one backwards.
        costs = [3 * rows.n_tokens for rows in self.calibration]
        progress, gains = self.scorer.progress, []
        progress.expect(sum(costs))
        for adapter, rows, cost in zip(self.adapters, self.calibration, costs):
            gains.append(module_gains(self.base, adapter, rows))
            progress.advance(cost)
        return gains

    def sketch(self, task: int) -> OutputSketch:
        """The `output_sketch` of some of a task's calibration rows.

        It is taken half way to the base model, where a merge of several tasks is.
        """
        if (sketch := self.kept_arrays.get(("sketch", task))) is None:
            rows, adapter = self.calibration[task].first(_SKETCHED, ()), self.adapters[task]
            cost = 3 * rows.n_tokens  # a pass forwards and one backwards
            self.scorer.progress.expect(cost)
            sketch = output_sketch(self.base, scaled(adapter, _HALF), rows, _SKETCH)
            self.scorer.progress.advance(cost)
            nbytes = sum(x.nbytes for x in sketch.values())
            self.kept_arrays.put(("sketch", task), sketch, nbytes)
        return sketch

    @cached_property
    def merges(self) -> dict[object, Any]:
        """Layer-wise merges by members and options: a search makes them, later stages take them.

        Their numbers are in files of the `spool`.
        """
        return {}

    @cached_property
    def spool(self) -> Spool:
        """Temporary files for merges, each of which is as large as an adapter."""
        return Spool()

    @cached_property
    def kept_arrays(self) -> ByteCache[Mapping[str, np.ndarray]]:
        """Inputs of modules by task, and its `sketch`, as far as memory has room for them."""
        return ByteCache(self.scorer.engine.free // 8)


def measure_losses(library: Library) -> LossTable:
    """Evaluate the base model, and every task's adapter at a few strengths, on calibration rows."""
    rows, strengths, dtype = library.calibration, sorted(STRENGTHS), library.base.dtype

    def weaker(module: Adapter, strength: float) -> Adapter:
        return scaled(module, strength).uniform(dtype)

    adapters = list(library.adapters)
    for change in (partial(weaker, strength=strength) for strength in strengths):
        adapters += [adapter.changed(change) for adapter in library.adapters]
    jobs: list[Job] = [(adapter, [own]) for adapter, own in zip(adapters, cycle(rows))]
    # Most adapters have one set, which would leave cores idle.
    base, *losses = library.scorer.losses([(None, rows), *jobs], in_parts=True)
    individual, *faded = np.array(losses).reshape(-1, len(rows))
    return LossTable(tuple(library.names), individual, base, tuple(strengths), np.array(faded).T)


def shrinkage(shifts: np.ndarray, n_targets: Sequence[int]) -> float:
    """The factor, from 0 to 1, that shrinks a mean per target towards 0 by its uncertainty.

    `max(0, 1 - (half-width of the 95 % confidence interval / mean) ** 2)`: 0 unless the mean is
    significant. It is the shrinkage of James and Stein (1961, positive part), with Student's t for
    few rows.

    Args:
        shifts: `(n_rows,)` sums over the targets of a row, in nats.
        n_targets: `(n_rows,)` numbers of targets.
    """
    from scipy.special import stdtrit

    n, sizes = len(shifts), np.asarray(n_targets)
    mean = float(shifts.sum()) / float(sizes.sum())
    if n < 2 or mean == 0:
        return 0.0
    # The variance of a ratio of sums over rows drawn at random.
    variance = n / (n - 1) * float(((shifts - mean * sizes) ** 2).sum()) / int(sizes.sum()) ** 2
    return max(0.0, 1 - float(stdtrit(n - 1, 0.975)) ** 2 * variance / mean**2)
