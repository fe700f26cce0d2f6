"""Refining: a short training that brings a merge, or a stored adapter, closer to its tasks' own.

The student starts as the merge or as the stored form (`training.py`). Its loss on a task is the KL
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
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.refine.training import (
    Form,
    Parameters,
    Student,
    TrainOptions,
    averaged,
    descend,
    plain,
    pull_back,
    student_of,
)
from d2c_mlx.utils.environment import all_cores
from d2c_mlx.utils.progress import Progress

__all__ = ["Member", "Refined", "refine"]

# A divergence, over the gain, that is lower by less is so by rounding.
_CLOSER = 1e-4
# Teacher rows of one task: those of the calibration rows, and of its adapter's own answers.
_Kinds = list[list[TeacherRow]]


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


def refine(
    base: Model,
    adapter: Form,
    members: Sequence[Member],
    options: TrainOptions | None = None,
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
    gains = [member.gain for member in members]
    with all_cores():
        tasks = []
        for member in members:
            sets = [rows for rows in (member.probe, member.own) if rows]
            tasks.append([model.teacher_rows(member.adapter, rows) for rows in sets])

        def divergence(form: Form) -> float:
            """Mean over the tasks of the divergence per target, over the gain."""
            student, each = plain(form, base.dtype), zip(tasks, gains)
            return float(np.mean([model.divergence(student, rows[0]) / n for rows, n in each]))

        before = divergence(adapter)
        trained = _train(
            model, student, tasks, gains, options or TrainOptions(), progress or Progress()
        )
        after = divergence(trained)
    return Refined(trained if after < before - _CLOSER else adapter, before, after)


def _train(
    model: Distiller,
    student: Student[Form],
    tasks: Sequence[_Kinds],
    gains: Sequence[float],
    options: TrainOptions,
    progress: Progress,
) -> Form:
    """The average of the parameters over all steps, as a pack would hold it.

    The student is attached.
    """

    def gradient(parameters: Parameters, turns: list[list[TeacherRow]]) -> Parameters:
        """That of the mean over the tasks of divergence / gain."""
        waiting, step, weights = iter(turns), [], []
        for kinds, gain in zip(tasks, gains):
            rows = [row for _ in kinds for row in next(waiting)]
            n_targets = sum(row.example.n_targets for row in rows)
            step += rows
            weights += [(0.0, 1 / (len(tasks) * gain * n_targets))] * len(rows)
        by_factor = model.gradient(student.factors(parameters), step, weights)
        return pull_back(student.factors, parameters, by_factor)

    sets = [
        ((options.seed, i, j), rows)
        for i, kinds in enumerate(tasks)
        for j, rows in enumerate(kinds)
    ]
    average, rate = student.start, student.rate if options.rate is None else options.rate
    steps = descend(average, gradient, sets, options, rate, progress)
    for number, parameters in enumerate(steps, 1):
        average = averaged(average, parameters, number)
        mx.eval(average)
    return student.form(average)
