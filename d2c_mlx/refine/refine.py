"""Refining: a short training that brings a merge, or a stored adapter, closer to its tasks' own.

The student starts as the merge or as the stored form (`students.py`). Its loss on a task is the KL
divergence from the task adapter on the calibration rows, over `gain` as in the normalised regret.
The rows' own answers take no part: a student that is less sure where the adapters are sure and
wrong has a lower cross entropy than they have, and worse answers. The result is a moving average:
single steps follow the few rows that they train on. No row is held back to judge by: the default
merge is fitted to all of them, so those that training leaves out speak for the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.distill import Distiller, TeacherRow
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.refine.steps import Parameters, averaged, descend, pull_back, turns
from d2c_mlx.refine.students import Form, Student, student_of
from d2c_mlx.utils.blas import all_cores
from d2c_mlx.utils.progress import Progress

__all__ = ["Member", "RefineOptions", "Refined", "refine"]

# A divergence, over the gain, that is lower by less is so by rounding.
_CLOSER = 1e-4


@dataclass(frozen=True)
class Member:
    """One task that an adapter serves.

    Attributes:
        adapter: the task adapter, which is the teacher.
        probe: calibration rows, prompts with answers.
        gain: nats that `adapter` gains over the base model, see `LossTable.gain`.
        own: more rows to train on, whose answers are the adapter's own.
    """

    adapter: Adapter
    probe: ExampleSet
    gain: float
    own: ExampleSet | None = None


@dataclass(frozen=True)
class RefineOptions:
    """Options of the training.

    Attributes:
        steps: number of steps.
        rate: highest learning rate of Adam: a warm-up over a tenth of the steps, then a cosine;
            None takes the student's own, see `students.Student.rate`.
        rows: rows of each task in a step, and as many of those with its adapter's own answers.
        seed: seed of the order of the rows.
    """

    steps: int = 40
    rate: float | None = None
    rows: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Refined(Generic[Form]):
    """A refined adapter, and how far it is from its members.

    Attributes:
        adapter: the result, a merge in the base model's 16-bit dtype; the unchanged adapter where
            training did not bring it closer.
        before: mean over the tasks of the divergence on the calibration rows, over the gain, of the
            adapter that was given; 0 for a merge of a single member.
        after: the same of what training made, as a pack would hold it; not finite where it
            overflowed.
    """

    adapter: Form
    before: float
    after: float


@dataclass(frozen=True)
class _Rows:
    """Rows of one task by kind: the calibration rows, and those with its adapter's own answers."""

    gain: float
    kinds: list[list[TeacherRow]]


def refine(
    base: BaseModel,
    adapter: Form,
    members: Sequence[Member],
    options: RefineOptions | None = None,
    progress: Progress | None = None,
) -> Refined[Form]:
    """Train an adapter to match its members.

    On one machine the same arguments give the same bytes. What a plan stores keeps its codes and
    its bytes: the scales and biases of its groups are trained.

    Args:
        base: base model of all adapters; one of them stays attached.
        adapter: a merge, or an adapter as a plan stores it, to start from.
        members: the tasks that it serves.
        options: how to train; None takes the defaults.
        progress: shows progress; None shows nothing.

    Returns:
        The refined adapter; the given one if that did not come closer, or for a merge of one.

    Raises:
        ModelError: the architecture scales or caps its logits.
    """
    if isinstance(adapter, Adapter) and len(members) == 1:
        return Refined(adapter, 0.0, 0.0)
    model, student = Distiller(base), student_of(adapter, base.dtype)
    with all_cores():
        tasks = []
        for one in members:
            kinds = [model.teacher_rows(one.adapter, some) for some in (one.probe, one.own) if some]
            tasks.append(_Rows(one.gain, kinds))
        before = _divergence(model, student.plain(adapter), tasks)
        trained = _train(model, student, tasks, options or RefineOptions(), progress or Progress())
        after = _divergence(model, student.plain(trained), tasks)
    return Refined(trained if after < before - _CLOSER else adapter, before, after)


def _train(
    model: Distiller,
    student: Student[Form],
    tasks: Sequence[_Rows],
    o: RefineOptions,
    progress: Progress,
) -> Form:
    """The average of the parameters over all steps, as a pack would hold it.

    The student is attached.
    """
    orders = [[turns(some, o.rows, (o.seed, i, j)) for j, some in enumerate(task.kinds)]
             for i, task in enumerate(tasks)]  # fmt: skip
    cost = _mean_cost(tasks, o.rows)
    progress.expect(o.steps * cost)

    def gradient(parameters: Parameters) -> Parameters:
        rows = [[row for turn in pair for row in next(turn)] for pair in orders]
        by_factor = model.gradient(student.factors(parameters), *_weighted(rows, tasks))
        return pull_back(student.factors, parameters, by_factor)

    average, rate = student.start, student.rate if o.rate is None else o.rate
    for step, parameters in enumerate(descend(average, gradient, o.steps, rate), 1):
        average = averaged(average, parameters, step)
        mx.eval(average)
        progress.advance(cost)
    return student.made(average)


def _mean_cost(tasks: Sequence[_Rows], n: int) -> int:
    """The mean number of tokens of a step."""
    sizes = [[len(row.example.tokens) for row in some] for one in tasks for some in one.kinds]
    return round(sum(min(n, len(some)) * sum(some) / len(some) for some in sizes))


def _weighted(
    rows: Sequence[Sequence[TeacherRow]], tasks: Sequence[_Rows]
) -> tuple[list[TeacherRow], list[tuple[float, float]]]:
    """Rows, and weights of their targets that give the mean over tasks of divergence / gain."""
    weights = []
    for some, task in zip(rows, tasks):
        n_targets = sum(row.example.n_targets for row in some)
        weights += [(0.0, 1 / (len(tasks) * task.gain * n_targets))] * len(some)
    return [row for some in rows for row in some], weights


def _divergence(model: Distiller, adapter: Adapter, tasks: Sequence[_Rows]) -> float:
    """Mean over the tasks of the divergence per target of their calibration rows, over the gain."""
    found = [model.divergence(adapter, task.kinds[0]) / task.gain for task in tasks]
    return float(np.mean(found))
