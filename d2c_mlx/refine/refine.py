"""Refining: a short training that brings a merge, or a stored adapter, closer to its tasks' own.

The loss on a task is the KL divergence from the task adapter on the calibration rows, over `gain`
as in the normalised regret. The rows' own answers take no part: a student that is less sure where
the adapters are sure and wrong has a lower cross entropy than they have, and worse answers. The
result is a moving average: single steps follow the few rows that they train on. No row is held back
to judge by: the default merge is fitted to all of them, so those that training leaves out speak for
the merge.

A student is an adapter in the numbers that its factors are made of. A merge trains its factors. An
adapter in the low bits of a plan keeps its codes and trains the scale and the bias of every group
of them, so nothing is rounded anew and no byte is added (PEQA, https://arxiv.org/abs/2305.14152; so
ends EfficientQAT, https://arxiv.org/abs/2407.11062).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.compressed import Compressed, Level, Quantized
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.utils.environment import all_cores
from d2c_mlx.utils.gguf_file import unpack_codes
from d2c_mlx.utils.progress import Progress

# Arrays in dicts, lists and tuples: what is trained.
Parameters = Any

Form = TypeVar("Form", Adapter, Compressed)

# Learning rates of a merge, and of a stored form, for which it is the best of four on three tasks:
# benchmarks/notes/2026-11-29-refining.md.
_MERGE_RATE, _STORED_RATE = 5e-4, 2e-3
# A divergence, over the gain, that is lower by less is so by rounding.
_CLOSER = 1e-4
# A step in forward passes of its tokens, for the progress display.
_PASSES = 3
# Least weight of a step in the average; the first steps count alike.
_NEWEST = 0.1


@dataclass(frozen=True)
class TrainOptions:
    """Options of a training.

    Attributes:
        steps: number of steps.
        rate: highest learning rate, see `descend`; None takes the student's own.
        rows: rows of each set in a step: of a task those with its answers, and as many of those
            with its adapter's own answers.
        seed: seed of the order of the rows.
    """

    steps: int = 40
    rate: float | None = None
    rows: int = 2
    seed: int = 0

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """What a step on these rows costs, in tokens that pass through the model."""
        n_tokens = sum(len(row.tokens) for row in rows)
        return _PASSES * min(self.rows, len(rows)) * n_tokens // len(rows)


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


@dataclass(frozen=True)
class Student(Generic[Form]):
    """An adapter in the form in which it is trained and stored.

    Attributes:
        start: parameters at the beginning.
        rate: learning rate that suits them.
        factors: makes factors of parameters, by operations of MLX.
        form: makes the adapter of parameters as a pack holds it.
    """

    start: Parameters
    rate: float
    factors: Callable[[Parameters], Factors]
    form: Callable[[Parameters], Form]


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
    model, student, o = Distiller(base), student_of(adapter, base.dtype), options or TrainOptions()
    with all_cores():
        tasks = []
        for member in members:
            kinds = [rows for rows in (member.probe, member.own) if rows]
            tasks.append([model.teacher_rows(member.adapter, rows) for rows in kinds])

        def divergence(form: Form) -> float:
            """Mean over the tasks of the divergence per target, over the gain."""
            attached, each = plain(form, base.dtype), zip(tasks, members)
            return float(
                np.mean([model.divergence(attached, rows[0]) / m.gain for rows, m in each])
            )

        def gradient(parameters: Parameters, turns: list[list[TeacherRow]]) -> Parameters:
            """That of the mean over the tasks of divergence / gain."""
            waiting, step, weights = iter(turns), [], []
            for kinds, member in zip(tasks, members):
                rows = [row for _ in kinds for row in next(waiting)]
                n_targets = sum(row.example.n_targets for row in rows)
                step += rows
                weights += [(0.0, 1 / (len(tasks) * member.gain * n_targets))] * len(rows)
            by_factor = model.gradient(student.factors(parameters), step, weights)
            return pull_back(student.factors, parameters, by_factor)

        before = divergence(adapter)  # its last adapter, the student, stays attached
        sets = [
            ((o.seed, i, j), rows) for i, kinds in enumerate(tasks) for j, rows in enumerate(kinds)
        ]
        average, rate = student.start, student.rate if o.rate is None else o.rate
        steps = descend(average, gradient, sets, o, rate, progress or Progress())
        for step, newest in enumerate(steps, 2):
            part = partial(lambda n, x, y: x + max(_NEWEST, 1 / n) * (y - x), step)
            average = tree_map(part, average, newest)
            mx.eval(average)
        trained = student.form(average)
        after = divergence(trained)
    return Refined(trained if after < before - _CLOSER else adapter, before, after)


def plain(form: Adapter | Compressed, dtype: mx.Dtype) -> Adapter:
    """The adapter to evaluate."""
    adapter = form if isinstance(form, Adapter) else form.adapter(dtype)
    assert adapter, f"{form.name}: a stored form has modules"
    return adapter


def student_of(form: Form, dtype: mx.Dtype) -> Student[Form]:
    """The student that starts as a form; a merge is packed in the base model's 16-bit `dtype`."""
    if not isinstance(form, Adapter):
        return _stored(form, dtype)
    start: Factors = {}
    for path, lora in sorted(form.modules.items()):
        (a, b), ratio = lora.factors(), _balance(lora)
        start[path] = mx.array(a * ratio)[None], mx.array(b / ratio)[None]

    def trained(parameters: Factors) -> Adapter:
        pairs = parameters.items()
        halves = {path: LoRA(a[0].astype(dtype), b[0].astype(dtype)) for path, (a, b) in pairs}
        return replace(form, modules=halves)

    return Student(start, _MERGE_RATE, lambda parameters: parameters, trained)


def _balance(lora: LoRA) -> float:
    """The ratio by which `a` is multiplied and `b` divided, so that both have one norm.

    Adam moves both by the same amount.
    """
    norms = [float(np.linalg.norm(x)) for x in lora.factors()]
    return math.sqrt(norms[1] / norms[0]) if min(norms) > 0 else 1.0


def _stored(stored: Compressed, dtype: mx.Dtype) -> Student[Compressed]:
    """Train scales and biases, and numbers that are in 16 bit; codes stay."""
    exact = plain(stored, dtype).modules
    parts, start = {}, {}
    for path, levels in stored.modules.items():
        ratio = _balance(exact[path])
        parts[path] = [(_Part(level.a, ratio), _Part(level.b, 1 / ratio)) for level in levels]
        start[path] = [(a.start(), b.start()) for a, b in parts[path]]

    def factors(parameters: Parameters) -> Factors:
        by_path: Factors = {}
        for path, levels in parts.items():
            pairs = list(zip(levels, parameters[path]))
            a, b = (mx.concatenate([level[i].rows(x[i]) for level, x in pairs]) for i in (0, 1))
            by_path[path] = a.T[None], b[None]
        return by_path

    def form(parameters: Parameters) -> Compressed:
        modules = {}
        for path, levels in parts.items():
            pairs = zip(levels, parameters[path])
            modules[path] = tuple(Level(a.form(x), b.form(y)) for (a, b), (x, y) in pairs)
        return replace(stored, modules=modules)

    return Student(start, _STORED_RATE, factors, form)


class _Part:
    """One factor of a level, times a ratio: rows whose codes stay."""

    def __init__(self, stored: Quantized, ratio: float) -> None:
        self._stored, self._ratio = stored, ratio
        self._codes = None  # numbers in 16 bit have none
        if stored.bits != 16:
            codes = unpack_codes(stored.weight, stored.bits)  # uint8
            self._codes = mx.array(codes.reshape(len(codes), -1, stored.group_size))

    def start(self) -> tuple[mx.array, ...]:
        """The parameters in float32: scales and biases of the groups, or 16-bit numbers."""
        stored = self._stored
        numbers = [stored.weight] if self._codes is None else [stored.scales, stored.biases]
        return tuple(mx.array(x.astype(np.float32) * self._ratio) for x in numbers)

    def rows(self, numbers: tuple[mx.array, ...]) -> mx.array:
        """The factor `(rows, width)`."""
        if self._codes is None:
            return numbers[0]
        scales, biases = (x[..., None] for x in numbers)
        values = scales * self._codes.astype(mx.float32) + biases
        return values.reshape(len(values), -1)[:, : self._stored.width]

    def form(self, numbers: tuple[mx.array, ...]) -> Quantized:
        """The factor with these numbers, over the ratio, in float16."""
        halves = [np.array((x / self._ratio).astype(mx.float16)) for x in numbers]
        if self._codes is None:
            return replace(self._stored, weight=halves[0])
        return replace(self._stored, scales=halves[0], biases=halves[1])


def descend(
    parameters: Parameters,
    gradient: Callable[[Parameters, list[list[TeacherRow]]], Parameters],
    sets: Sequence[tuple[Sequence[int], Sequence[TeacherRow]]],
    options: TrainOptions,
    rate: float,
    progress: Progress,
) -> Iterator[Parameters]:
    """Yield the parameters after each step of Adam.

    Its learning rate rises to `rate` over a tenth of the steps, then falls as a cosine.

    Args:
        parameters: at the beginning.
        gradient: of the parameters, for the rows that a step takes of each set.
        sets: numbers that seed the order of rows, and the rows.
        options: steps, and rows of each set in a step.
        rate: highest learning rate.
        progress: shows progress.
    """
    warm = options.steps // 10
    schedule = optim.cosine_decay(rate, max(1, options.steps - warm))
    if warm:
        rising = optim.linear_schedule(rate / warm, rate, warm)
        schedule = optim.join_schedules([rising, schedule], [warm])
    optimizer = optim.Adam(schedule, betas=[0.9, 0.99], bias_correction=True)
    orders = [_turns(rows, options.rows, seed) for seed, rows in sets]
    cost = sum(options.step_tokens([row.example for row in rows]) for _, rows in sets)
    progress.expect(options.steps * cost)
    for _ in range(options.steps):
        steepest = gradient(parameters, [next(order) for order in orders])
        clipped, _ = optim.clip_grad_norm(steepest, 1.0)
        parameters = optimizer.apply_gradients(clipped, parameters)
        mx.eval(parameters, optimizer.state)
        yield parameters
        progress.advance(cost)


def _turns(rows: Sequence[TeacherRow], n: int, seed: Sequence[int]) -> Iterator[list[TeacherRow]]:
    """Yield `n` rows at a time, in rounds that have every row once, in a new order."""
    rng, waiting, n = np.random.default_rng(seed), list[TeacherRow](), min(n, len(rows))
    while True:
        while len(waiting) < n:
            waiting += [rows[i] for i in rng.permutation(len(rows))]
        yield waiting[:n]
        del waiting[:n]


def pull_back(
    make: Callable[[Parameters], Factors], parameters: Parameters, gradient: Factors
) -> Parameters:
    """The gradient of the parameters, from that of the factors which `make` makes of them."""

    def inner(values: Parameters) -> mx.array:
        products = tree_map(lambda x, g: (x * g).sum(), make(values), gradient)
        return sum(x for _, x in tree_flatten(products))

    return mx.grad(inner)(parameters)
