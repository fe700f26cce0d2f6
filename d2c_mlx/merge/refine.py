"""Refining a merge: a short training that brings a multi-task adapter closer to its members.

The student starts as the merge. Its loss on a task is the KL divergence from the task adapter on
the calibration rows, over `gain` as in the normalised regret. The rows' own answers take no part,
neither in training nor in judging: a student that is less sure where the adapters are sure and
wrong has a lower cross entropy than they have, and worse answers. What is judged and kept is a
moving average of the factors: single steps follow the few rows that they train on. Calibration rows
that are held back from training choose the step to keep. What they judge is what a pack would hold
(16 bit, rank kept), and the unrefined merge takes part as step 0. So refining never takes a merge
further from its members on them.
"""

from __future__ import annotations

import math
import zlib
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

__all__ = ["Member", "RefineOptions", "Refined", "hold_back", "refine", "schedule", "turns"]

# Least weight of a step in the average; the first steps count alike.
_NEWEST = 0.1


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
        steps: most steps.
        rate: highest learning rate of Adam: a warm-up over a tenth of the steps, then a cosine.
        held_share: share of every task's calibration rows that is held back; tasks with fewer than
            three rows hold none back.
        rows: rows of each task in a step, and as many of those with its adapter's own answers.
        every: steps between two evaluations on the held-back rows.
        patience: evaluations without a new best before the training stops.
        eps: the merge is kept unless the held-back divergence falls by more than this.
        seed: seed of the choice of held-back rows, and of the order of the others.
    """

    steps: int = 40
    rate: float = 5e-4
    held_share: float = 0.3
    rows: int = 2
    every: int = 5
    patience: int = 3
    eps: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Refined:
    """A refined adapter and the course of its training.

    Attributes:
        adapter: the result, in the base model's 16-bit dtype; the unchanged merge if `step` is 0.
        step: the step that was kept.
        curve: (step, mean over the tasks of the divergence on the held-back rows, over the gain)
            per evaluation, step 0 first.
        stopped: why it ended: steps, patience, diverged, one member, or nothing held back.
        unjudged: tasks with too few rows to hold any back.
    """

    adapter: Adapter
    step: int
    curve: tuple[tuple[int, float], ...]
    stopped: str
    unjudged: tuple[str, ...]


@dataclass(frozen=True)
class _Rows:
    """Rows of one task: kinds of rows to train on, with given or own answers; those held back."""

    gain: float
    trained: list[list[TeacherRow]]
    held: list[TeacherRow]


def hold_back(probe: ExampleSet, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Split calibration rows into those to train on and those to hold back.

    A task's split does not depend on the other tasks.

    Args:
        probe: calibration rows of one task.
        share: share of the rows to hold back; none of fewer than three rows.
        seed: seed of the draw.

    Returns:
        Indices of the rows to train on, and of those to hold back, both ascending.
    """
    n = len(probe.examples)
    order = np.random.default_rng([seed, zlib.crc32(probe.task.encode())]).permutation(n)
    n_held = min(max(1, round(share * n)), n - 1) if n >= 3 else 0
    return sorted(order[n_held:].tolist()), sorted(order[:n_held].tolist())


def refine(
    base: BaseModel,
    merged: Adapter,
    members: Sequence[Member],
    options: RefineOptions | None = None,
    meter: Meter | None = None,
) -> Refined:
    """Train `merged` to match its members; never further from them on the held-back rows.

    Use it where a merge loses much and rows suffice to hold some back. On one machine the same
    arguments give the same bytes.

    Args:
        base: base model of all adapters; one of them stays attached.
        merged: the merge to start from.
        members: the tasks that it serves.
        options: how to train; None takes the defaults.
        meter: shows progress; None shows nothing.

    Returns:
        The refined adapter; the merge itself for a single member, or if no task holds rows back.

    Raises:
        ModelError: the architecture scales or caps its logits.
    """
    options = options or RefineOptions()
    splits = [hold_back(one.probe, options.held_share, options.seed) for one in members]
    unjudged = tuple(one.probe.task for one, (_, held) in zip(members, splits) if not held)
    if len(members) == 1 or len(unjudged) == len(members):
        reason = "one member" if len(members) == 1 else "nothing held back"
        return Refined(merged, 0, (), reason, unjudged)
    model = Distiller(base)
    with all_cores():
        tasks = []
        for one, (train, held) in zip(members, splits):
            rows = model.teacher_rows(one.adapter, one.probe)
            trained = [[rows[i] for i in train]]
            if one.own:
                trained.append(model.teacher_rows(one.adapter, one.own))
            tasks.append(_Rows(one.gain, trained, [rows[i] for i in held]))
        refined = _train(model, merged, tasks, options, meter or Silent())
    return replace(refined, unjudged=unjudged)


def _train(
    model: Distiller, merged: Adapter, tasks: Sequence[_Rows], o: RefineOptions, meter: Meter
) -> Refined:
    """Train until the held-back rows have not gained for a while."""
    orders = [[turns(some, o.rows, (o.seed, i, j)) for j, some in enumerate(task.trained)]
             for i, task in enumerate(tasks)]  # fmt: skip
    cost = _mean_cost(tasks, o.rows)
    meter.expect(o.steps * cost)
    optimizer = optim.Adam(schedule(o.steps, o.rate), betas=[0.9, 0.99], bias_correction=True)
    factors = average = _balanced(merged)
    curve = [(0, _divergence(model, merged, tasks))]
    best, kept, step, stopped = curve[0][1] - o.eps, (0, merged), 0, "steps"
    while step < o.steps:
        step += 1
        rows = [[row for turn in pair for row in next(turn)] for pair in orders]
        gradient = model.gradient(factors, *_weighted(rows, tasks))
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        factors = optimizer.apply_gradients(gradient, factors)
        average = _averaged(average, factors, step)
        mx.eval(factors, average, optimizer.state)
        meter.advance(cost)
        if step % o.every and step < o.steps:
            continue
        # The candidate is what a pack would hold, rounding to 16 bit included.
        candidate = _adapter(merged, average, model.base.dtype)
        divergence = _divergence(model, candidate, tasks)
        if not math.isfinite(divergence):
            stopped = "diverged"
            break
        curve.append((step, divergence))
        if divergence < best:
            best, kept = divergence, (step, candidate)
        elif step - kept[0] >= o.patience * o.every:
            stopped = "patience"
            break
    meter.expect((step - o.steps) * cost)
    return Refined(kept[1], kept[0], tuple(curve), stopped, ())


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
    sizes = [[len(row.example.tokens) for row in some] for one in tasks for some in one.trained]
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
    """Mean over the tasks that hold rows back of their divergence per target, over the gain."""
    judged = [task for task in tasks if task.held]
    found = [model.divergence(adapter, task.held) / task.gain for task in judged]
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
