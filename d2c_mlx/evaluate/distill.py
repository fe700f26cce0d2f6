"""Passes with a gradient: towards an adapter's predictions, by its modules' scales and outputs.

Losses against a teacher come from `Distiller.with_teacher` and the engine, which is exact and
cached; gradients and whole comparisons from `Distiller` itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.batches import batches_by_length, pad_batch, sums_by_row
from d2c_mlx.evaluate.capture import capture_modules
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.forward import KeysValues, find_head, head_in_float32, run_blocks
from d2c_mlx.models.kernels import target_scores
from d2c_mlx.models.model import Model
from d2c_mlx.utils.device import on_cpu
from d2c_mlx.utils.environment import all_cores
from d2c_mlx.utils.errors import ModelError

# Scales of the adapter at which derivatives are taken. A small pack is near the base; near the
# whole adapter the loss of ten rows is flat, and its derivatives are noise. More points cost more
# and say the same (benchmarks/notes/2026-11-29-estimates.md).
POINTS = (0.2,)
# Padded tokens whose activations are kept at a time; a step adds the gradients of several batches.
_BATCH = 512

# Module path -> a `(1, in, r)` and b `(1, r, out)`, float32, the scale folded in.
Factors = dict[str, KeysValues]
# Module path -> `(n, out)`, float32.
OutputSketch = Mapping[str, np.ndarray]


class TeacherRow(NamedTuple):
    """A row and its teacher targets.

    Over the whole vocabulary KL(teacher || student) = `lse(z) - mean . h + constant`, for logits z
    and hidden states h of the student: the head is linear, so the teacher enters by its mean row of
    the head and by one number (its entropy, to a sign and a shift) per target. That is a hundred
    times smaller than logits, and exact with `head_in_float32`. It is why an architecture whose
    head is not linear is refused.

    Attributes:
        example: the tokens.
        targets: `(n_targets, hidden + 1)` float32: the head's rows averaged by the teacher's
            probabilities, and the constant.
        nll: sum over the targets under the teacher, in nats.
    """

    example: Example
    targets: np.ndarray
    nll: float


class Distiller:
    """Teacher targets and gradients on one base model; the adapter attached last stays attached."""

    def __init__(self, base: Model) -> None:
        """Find the head; raises ModelError if the architecture scales or caps its logits."""
        head = find_head(base.model)
        if head is None:
            raise ModelError(
                f"{base.name}: training needs a head that is linear in the hidden states; this"
                " architecture scales or caps its logits"
            )
        self.base, self._head, self._fast = base, head_in_float32(head), on_cpu()

    def teacher_rows(
        self, adapter: Adapter, rows: ExampleSet, label_weight: float = 0.0
    ) -> list[TeacherRow]:
        """Teacher targets of rows, in their order, for `compare` and `gradient`.

        Args:
            adapter: the teacher.
            rows: their answers only say at which tokens the teacher is asked.
            label_weight: weight of the rows' own targets, from 0 to 1; the teacher has the rest.
        """
        self.base.attach(adapter)
        examples, answered = rows.examples, dict[int, TeacherRow]()
        for batch in batches_by_length([len(row.tokens) for row in examples], _BATCH):
            members = [examples[i] for i in batch]
            hidden, targets = self._hidden(members)
            ones = mx.ones(len(targets))
            (lse, gold), (mean,) = mx.vjp(
                lambda h, targets=targets: target_scores(self._head(h), targets, self._fast),
                [hidden],
                [(1 - label_weight) * ones, label_weight * ones],
            )
            constant = (mean * hidden).sum(axis=-1, keepdims=True) - lse[:, None]
            ends = np.cumsum([row.n_targets for row in members])[:-1]
            by_row = np.split(np.array(mx.concatenate([mean, constant], axis=1)), ends)
            nll = np.split(np.array(lse - gold), ends)
            for i, each, values in zip(batch, by_row, nll):
                answered[i] = TeacherRow(examples[i], each, float(values.sum()))
        return [answered[i] for i in range(len(examples))]

    def own_rows(self, rows: ExampleSet) -> list[TeacherRow]:
        """Rows without a teacher, for `gradient` with `w_kl` 0: training on their own answers."""
        width = self.base.dimensions[0] + 1
        return [
            TeacherRow(row, np.zeros((row.n_targets, width), np.float32), 0.0)
            for row in rows.examples
        ]

    def with_teacher(
        self,
        adapter: Adapter,
        examples: ExampleSet,
        label_weight: float = 0.0,
        rows: Sequence[TeacherRow] | None = None,
    ) -> ExampleSet:
        """The set with teacher targets: the engine's loss on it is KL(adapter || student).

        That is the expected rise of the NLL if the adapter is right, without the luck of the few
        answers at hand, of which a student may be surer than its teacher.

        Args:
            adapter: the teacher.
            examples: the rows; their own answers only say at which tokens the adapter is asked.
            label_weight: from 0 to 1; above 0 the loss is `(1 - label_weight) * KL + label_weight *
                (NLL of the rows' own answers minus that under the adapter)`, which may be negative.
            rows: `teacher_rows` of the same arguments, if they are known.
        """
        rows = rows or self.teacher_rows(adapter, examples, label_weight)
        teacher = f"{adapter.digest} {label_weight!r}" if label_weight else adapter.digest
        targets = tuple(row.targets for row in rows)
        return replace(examples, teacher=teacher, teacher_targets=targets)

    def compare(self, adapter: Adapter, rows: Sequence[TeacherRow]) -> np.ndarray:
        """Compare a student with the rows' teachers.

        Returns:
            `(n_rows, 2)`, summed over targets, in nats: NLL minus the teacher's NLL, and
            KL(teacher || adapter).
        """
        self.base.attach(adapter)
        sums = np.empty((len(rows), 2))
        for batch in batches_by_length([len(row.example.tokens) for row in rows], _BATCH):
            members = [rows[i] for i in batch]
            values = np.array(mx.stack(self._losses(members)), np.float64)
            sums[batch] = sums_by_row(values, [row.example for row in members]).T
        sums[:, 0] -= [row.nll for row in rows]
        return sums

    def divergence(self, adapter: Adapter, rows: Sequence[TeacherRow]) -> float:
        """Mean KL(teacher || adapter) per target, in nats."""
        total = float(self.compare(adapter, rows)[:, 1].sum())
        return total / sum(row.example.n_targets for row in rows)

    def gradient(
        self, factors: Factors, rows: Sequence[TeacherRow], weights: Sequence[tuple[float, float]]
    ) -> Factors:
        """The gradient of the sum over targets of `w_nll * NLL + w_kl * KL(teacher || student)`.

        Args:
            factors: the student's factors, whose modules are those of the attached adapter.
            rows: rows with their teacher targets.
            weights: `(w_nll, w_kl)` of every row.
        """
        # Weights are far below 1, and in float16 so would the gradients of states be, to nothing. A
        # power of two changes no digit.
        unit = 2.0 ** math.frexp(max(map(max, weights)))[1]
        total: Factors = tree_map(mx.zeros_like, factors)
        for batch in batches_by_length([len(row.example.tokens) for row in rows], _BATCH):
            members = [rows[i] for i in batch]
            by_row = np.array([weights[i] for i in batch], np.float32) / unit
            each = np.repeat(by_row, [row.example.n_targets for row in members], axis=0)
            total = tree_map(mx.add, total, mx.grad(self.loss)(factors, members, mx.array(each)))
            mx.eval(total)
        return tree_map(lambda x: x * unit, total)

    def loss(self, factors: Factors, rows: Sequence[TeacherRow], weights: mx.array) -> mx.array:
        """The loss that `gradient` differentiates, with `weights (n_targets, 2)`."""
        with self.base.replaced_factors([factors[path] for path in self.base.attached_factors]):
            nll, divergence = self._losses(rows)
        return (weights[:, 0] * nll + weights[:, 1] * divergence).sum()

    def _losses(self, rows: Sequence[TeacherRow]) -> list[mx.array]:
        """`(n_targets,)` NLL, and KL(teacher || student), see `TeacherRow`."""
        hidden, targets = self._hidden([row.example for row in rows])
        lse, gold = target_scores(self._head(hidden), targets, self._fast)
        teacher = mx.array(np.concatenate([row.targets for row in rows]))
        divergence = lse - (teacher[:, :-1] * hidden).sum(axis=-1) + teacher[:, -1]
        return [lse - gold, divergence]

    def _hidden(self, examples: Sequence[Example]) -> tuple[mx.array, mx.array]:
        """States before every target, float32 `(n_targets, hidden)`, and the targets' ids."""
        x, places, targets = pad_batch(examples)
        return run_blocks(self.base.model, x)[places].astype(mx.float32), targets


def module_gains(
    base: Model, adapter: Adapter, examples: ExampleSet, points: Sequence[float] = POINTS
) -> dict[str, float]:
    """How much each module of an adapter lowers the loss, in nats per target token.

    All modules are scaled together from 0 (the base model) to 1. The fall of the loss along the way
    is the integral of its derivatives by the scales of the modules, so over points of the whole way
    the gains add up to `NLL(base) - NLL(adapter)`. A planner weighs bytes by them.

    Args:
        base: the base model.
        adapter: the adapter of the examples' task.
        examples: rows on which the loss is measured.
        points: scales between 0 and 1 whose derivatives are averaged.

    Returns:
        Module path -> gain; below 0 where a module does harm.

    Source: Integrated Gradients, https://arxiv.org/abs/1703.01365.
    """
    nll, rows = _nll_of(base), examples.examples

    def loss(scales: mx.array, batch: Sequence[Example]) -> mx.array:
        with base.replaced_factors(
            [(a, b * s.astype(b.dtype)) for (a, b), s in zip(factors.values(), scales)]
        ):
            return nll(batch)

    with base.attached(adapter), all_cores():
        factors = base.attached_factors
        gains = np.zeros(len(factors))
        for batch in batches_by_length([len(row.tokens) for row in rows], _BATCH):
            for x in points:
                gradient = mx.grad(loss)(mx.full(len(factors), x), [rows[i] for i in batch])
                gains -= np.array(gradient, np.float64)
    return dict(zip(factors, (gains / (len(points) * examples.n_targets)).tolist()))


def output_sketch(base: Model, adapter: Adapter, examples: ExampleSet, n: int) -> OutputSketch:
    """A random projection of the derivatives of the loss by the outputs of an adapter's modules.

    Its Gram matrices are, up to the projection, those of the derivatives at all tokens, per target.

    Args:
        base: the base model.
        adapter: attached meanwhile; its modules are those asked for.
        examples: rows whose NLL is the loss.
        n: rows of the sketch.
    """
    nll, rows, rng = _nll_of(base), examples.examples, np.random.default_rng(0)
    zeros = {path: mx.zeros((n, lora.shape[1])) for path, lora in adapter.modules.items()}
    sketch, size = zeros, (n * examples.n_targets) ** 0.5
    with base.attached(adapter), capture_modules(base.model, list(zeros)) as capture, all_cores():

        def loss(points: Mapping[str, mx.array], batch: list[Example], along: mx.array) -> mx.array:
            # At zeros the derivative by a point is the projection of those by the outputs.
            capture.inputs = {}
            capture.shifts = {path: along @ x for path, x in points.items()}
            return nll(batch)

        for batch in batches_by_length([len(row.tokens) for row in rows], _BATCH // 4):
            members = [rows[i] for i in batch]
            shape = len(members), max(len(row.tokens) for row in members) - 1
            normal = rng.standard_normal((n, math.prod(shape)), np.float32) / size
            along = mx.array(normal.T.reshape(*shape, n))
            sketch = tree_map(mx.add, sketch, mx.grad(loss)(zeros, members, along))
            mx.eval(sketch)
    return {path: np.array(x) for path, x in sketch.items()}


def _nll_of(base: Model) -> Callable[[Sequence[Example]], mx.array]:
    """The NLL of rows, summed over their targets; without logits of other tokens if it can be."""
    head, fast = find_head(base.model), on_cpu()

    def nll(rows: Sequence[Example]) -> mx.array:
        x, places, targets = pad_batch(rows)
        logits = head(run_blocks(base.model, x)[places]) if head else base.model(x)[places]
        normaliser, gold = target_scores(logits, targets, fast)
        return (normaliser - gold).sum()

    return nll
