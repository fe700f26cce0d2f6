"""Refining a merge: a short training that brings a multi-task adapter back to its members.

The student starts as the merge. Its loss on a task is cross entropy on the probe answers plus the
KL divergence from the task's own adapter, over `gain` as in the normalised regret that judges
partitions. Probe rows that are held back choose the step to keep; the merge itself is step 0.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.evaluate.evaluator import Meter, Silent
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.blas import all_cores

__all__ = ["Member", "RefineOptions", "Refined", "hold_back", "refine"]


@dataclass(frozen=True)
class Member:
    """One task of a merged adapter.

    Attributes:
        adapter: the task's own, which is matched.
        probe: prompts with answers.
        gain: nats that `adapter` gains over the base model, as `cluster.Problem.gain`.
        prompts: prompts without answers, see `Distiller.teach`.
    """

    adapter: Adapter
    probe: ExampleSet
    gain: float
    prompts: ExampleSet | None = None


@dataclass(frozen=True)
class RefineOptions:
    """How to train.

    Attributes:
        steps: most steps.
        rate: highest learning rate of Adam: a warm-up over a tenth of the steps, then a cosine.
        kl_weight: of the divergence, beside 1 for the cross entropy.
        held_share: of every task's probe rows; tasks with fewer than three rows hold none back.
        rows: of each task in a step, and as many of its prompts without answers.
        every: steps between two looks at the held-back rows.
        patience: looks without a new best before it stops.
        eps: the merge is kept unless the held-back regret falls by more.
        seed: of the held-back rows and of the order of the others.
    """

    steps: int = 40
    rate: float = 5e-4
    kl_weight: float = 1.0
    held_share: float = 0.3
    rows: int = 2
    every: int = 5
    patience: int = 5
    eps: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Refined:
    """A refined adapter and how it came about.

    Attributes:
        adapter: in the base's 16-bit dtype; the merge itself, unchanged, where `step` is 0.
        step: whose factors these are.
        curve: (step, mean normalised regret on the held-back rows) of every look, step 0 first.
        stopped: steps, patience, diverged, one member, or nothing held back.
        unjudged: tasks with too few rows to hold any back.
    """

    adapter: Adapter
    step: int
    curve: tuple[tuple[int, float], ...]
    stopped: str
    unjudged: tuple[str, ...]


@dataclass(frozen=True)
class _Rows:
    """Of one task: what is trained on, with and without answers, and what is held back."""

    gain: float
    answered: list[TeacherRow]
    prompts: list[TeacherRow]
    held: list[TeacherRow]

    @property
    def trained(self) -> list[list[TeacherRow]]:
        return [some for some in (self.answered, self.prompts) if some]


def hold_back(probe: ExampleSet, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row indices to train on and to hold back; a task draws alike in whatever company."""
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
    """Train `merged` to match its members; never worse than `merged` on the held-back rows.

    The same bytes for the same arguments on one machine.

    Args:
        base: of all adapters; left with one of them attached.
        merged: where to start.
        members: the tasks it serves.
        options: how to train; None is the defaults.
        meter: is told of the tokens.

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
            rows = model.teacher_rows(one.adapter, one.probe, one.prompts)
            prompts = rows[len(one.probe.examples) :]
            tasks.append(
                _Rows(one.gain, [rows[i] for i in train], prompts, [rows[i] for i in held])
            )
        refined = _train(model, merged, tasks, options, meter or Silent())
    return replace(refined, unjudged=unjudged)


def _train(
    model: Distiller, merged: Adapter, tasks: Sequence[_Rows], o: RefineOptions, meter: Meter
) -> Refined:
    """Steps until the held-back rows have not gained for a while."""
    turns = [[_turns(some, o.rows, (o.seed, i, j)) for j, some in enumerate(task.trained)]
             for i, task in enumerate(tasks)]  # fmt: skip
    cost = _mean_cost(tasks, o.rows)
    meter.expect(o.steps * cost)
    optimizer = optim.Adam(_schedule(o), betas=[0.9, 0.99], bias_correction=True)
    factors = _balanced(merged)
    curve = [(0, _regret(model, merged, tasks))]
    best, kept, step, stopped = curve[0][1] - o.eps, (0, merged), 0, "steps"
    while step < o.steps:
        step += 1
        rows = [[row for turn in pair for row in next(turn)] for pair in turns]
        gradient = model.gradient(factors, *_weighted(rows, tasks, o.kl_weight))
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        factors = optimizer.apply_gradients(gradient, factors)
        mx.eval(factors, optimizer.state)
        meter.advance(cost)
        if step % o.every and step < o.steps:
            continue
        # What is judged is what a pack would hold, rounding included.
        candidate = _adapter(merged, factors, model.base.dtype)
        regret = _regret(model, candidate, tasks)
        if not math.isfinite(regret):
            stopped = "diverged"
            break
        curve.append((step, regret))
        if regret < best:
            best, kept = regret, (step, candidate)
        elif step - kept[0] >= o.patience * o.every:
            stopped = "patience"
            break
    meter.expect((step - o.steps) * cost)
    return Refined(kept[1], kept[0], tuple(curve), stopped, ())


def _schedule(o: RefineOptions) -> Callable[[mx.array], mx.array]:
    warm = o.steps // 10
    falling = optim.cosine_decay(o.rate, max(1, o.steps - warm))
    if not warm:
        return falling
    rising = optim.linear_schedule(o.rate / warm, o.rate, warm)
    return optim.join_schedules([rising, falling], [warm])


def _turns(rows: Sequence[TeacherRow], n: int, seed: Sequence[int]) -> Iterator[list[TeacherRow]]:
    """`n` rows at a time, in rounds: every row once, in a new order."""
    rng = np.random.default_rng(seed)
    waiting: list[TeacherRow] = []
    n = min(n, len(rows))
    while True:
        while len(waiting) < n:
            waiting += [rows[i] for i in rng.permutation(len(rows))]
        yield waiting[:n]
        del waiting[:n]


def _mean_cost(tasks: Sequence[_Rows], n: int) -> int:
    """Tokens of a step, on average."""
    sizes = [[len(row.example.tokens) for row in some] for one in tasks for some in one.trained]
    return round(sum(min(n, len(some)) * sum(some) / len(some) for some in sizes))


def _weighted(
    rows: Sequence[Sequence[TeacherRow]], tasks: Sequence[_Rows], kl_weight: float
) -> tuple[list[TeacherRow], list[tuple[float, float]]]:
    """Rows and weights of their targets: the mean over tasks of mean loss / gain."""
    weights = []
    for some, task in zip(rows, tasks):
        share = 1 / (len(tasks) * task.gain)
        n_all = sum(row.example.n_targets for row in some)
        n_answered = sum(row.example.n_targets for row in some if row.answered)
        weights += [
            (share / n_answered if row.answered else 0.0, kl_weight * share / n_all) for row in some
        ]
    return [row for some in rows for row in some], weights


def _regret(model: Distiller, adapter: Adapter, tasks: Sequence[_Rows]) -> float:
    """Mean normalised regret over the tasks that hold rows back."""
    judged = [task for task in tasks if task.held]
    regrets = [model.excess(adapter, task.held) / task.gain for task in judged]
    return float(np.mean(regrets))


def _balanced(adapter: Adapter) -> Factors:
    """Both factors of one norm, because Adam moves both by the same amount."""
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
