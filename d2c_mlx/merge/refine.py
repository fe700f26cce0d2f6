"""Refining a merge: a short training that brings a multi-task adapter closer to its members.

The student starts as the merge. Its loss on a task is the KL divergence from the task adapter on
the calibration rows, over `gain` as in the normalised regret. The rows' own answers take no part: a
student that is less sure where the adapters are sure and wrong has a lower cross entropy than they
have, and worse answers. The result is a moving average of the factors: single steps follow the few
rows that they train on. No row is held back to judge by: the default merge is fitted to all of
them, so those that training leaves out speak for the merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.evaluate.evaluator import Meter, Silent
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.blas import all_cores

__all__ = ["Member", "RefineOptions", "Refined", "refine", "schedule", "turns"]

# Least weight of a step in the average; the first steps count alike.
_NEWEST = 0.1
# A divergence, over the gain, that is lower by less is so by rounding.
_CLOSER = 1e-4


@dataclass(frozen=True)
class Member:
    """One task of a merged adapter.

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
        rate: highest learning rate of Adam: a warm-up over a tenth of the steps, then a cosine.
        rows: rows of each task in a step, and as many of those with its adapter's own answers.
        seed: seed of the order of the rows.
    """

    steps: int = 40
    rate: float = 5e-4
    rows: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Refined:
    """A refined adapter, and how far it is from its members.

    Attributes:
        adapter: the result, in the base model's 16-bit dtype; the unchanged merge where training
            did not bring it closer.
        before: mean over the tasks of the divergence on the calibration rows, over the gain, of the
            merge; 0 for a single member.
        after: the same of what training made, as a pack would hold it.
    """

    adapter: Adapter
    before: float
    after: float


@dataclass(frozen=True)
class _Rows:
    """Rows of one task by kind: the calibration rows, and those with its adapter's own answers."""

    gain: float
    kinds: list[list[TeacherRow]]


def refine(
    base: BaseModel,
    merged: Adapter,
    members: Sequence[Member],
    options: RefineOptions | None = None,
    meter: Meter | None = None,
) -> Refined:
    """Train `merged` to match its members.

    On one machine the same arguments give the same bytes.

    Args:
        base: base model of all adapters; one of them stays attached.
        merged: the merge to start from.
        members: the tasks that it serves.
        options: how to train; None takes the defaults.
        meter: shows progress; None shows nothing.

    Returns:
        The refined adapter; the merge itself for a single member, or if it did not come closer.

    Raises:
        ModelError: the architecture scales or caps its logits.
    """
    if len(members) == 1:
        return Refined(merged, 0.0, 0.0)
    model = Distiller(base)
    with all_cores():
        tasks = []
        for one in members:
            kinds = [model.teacher_rows(one.adapter, some) for some in (one.probe, one.own) if some]
            tasks.append(_Rows(one.gain, kinds))
        before = _divergence(model, merged, tasks)
        trained = _train(model, merged, tasks, options or RefineOptions(), meter or Silent())
        after = _divergence(model, trained, tasks)
    return Refined(trained if after < before - _CLOSER else merged, before, after)


def _train(
    model: Distiller, merged: Adapter, tasks: Sequence[_Rows], o: RefineOptions, meter: Meter
) -> Adapter:
    """The average of the factors over all steps, as a pack would hold it: 16 bit, rank kept."""
    orders = [[turns(some, o.rows, (o.seed, i, j)) for j, some in enumerate(task.kinds)]
             for i, task in enumerate(tasks)]  # fmt: skip
    cost = _mean_cost(tasks, o.rows)
    meter.expect(o.steps * cost)
    optimizer = optim.Adam(schedule(o.steps, o.rate), betas=[0.9, 0.99], bias_correction=True)
    factors = average = _balanced(merged)
    for step in range(1, o.steps + 1):
        rows = [[row for turn in pair for row in next(turn)] for pair in orders]
        gradient = model.gradient(factors, *_weighted(rows, tasks))
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        factors = optimizer.apply_gradients(gradient, factors)
        average = _averaged(average, factors, step)
        mx.eval(factors, average, optimizer.state)
        meter.advance(cost)
    return _adapter(merged, average, model.base.dtype)


def schedule(steps: int, rate: float) -> Callable[[mx.array], mx.array]:
    """Learning rates that rise to `rate` over a tenth of the steps, then fall as a cosine."""
    warm = steps // 10
    falling = optim.cosine_decay(rate, max(1, steps - warm))
    if not warm:
        return falling
    rising = optim.linear_schedule(rate / warm, rate, warm)
    return optim.join_schedules([rising, falling], [warm])


def turns(rows: Sequence[TeacherRow], n: int, seed: Sequence[int]) -> Iterator[list[TeacherRow]]:
    """Yield `n` rows at a time, in rounds that have every row once, in a new order."""
    rng = np.random.default_rng(seed)
    waiting: list[TeacherRow] = []
    n = min(n, len(rows))
    while True:
        while len(waiting) < n:
            waiting += [rows[i] for i in rng.permutation(len(rows))]
        yield waiting[:n]
        del waiting[:n]


def _averaged(average: Factors, factors: Factors, step: int) -> Factors:
    """The average of the start and of the factors after every step, the latest ones in the main."""
    newest = max(_NEWEST, 1 / (step + 1))
    moved: Factors = tree_map(lambda old, new: old + newest * (new - old), average, factors)
    return moved


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


def _balanced(adapter: Adapter) -> Factors:
    """Factors of equal norm, because Adam moves both by the same amount."""
    factors = {}
    for path in sorted(adapter.modules):
        a, b = adapter.modules[path].factors()
        norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        ratio = math.sqrt(norms[1] / norms[0]) if min(norms) > 0 else 1.0
        factors[path] = mx.array(a * ratio)[None], mx.array(b / ratio)[None]
    return factors


def _adapter(merged: Adapter, factors: Factors, dtype: mx.Dtype) -> Adapter:
    modules = {
        path: LoRA(a[0].astype(dtype), b[0].astype(dtype)) for path, (a, b) in factors.items()
    }
    return replace(merged, modules=modules)
