"""What an adapter says of its rows, and the gradient that brings another one to say the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.batches import by_length, target_places
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.forward import KeysValues, find_head, in_float32, run_blocks
from d2c_mlx.models.kernels import target_scores
from d2c_mlx.utils.errors import ModelError

__all__ = ["Distiller", "Factors", "Row"]

# Padded tokens whose activations are kept at a time; a step adds the gradients of several batches.
_BATCH = 512

# Module path -> a `(1, in, r)` and b `(1, r, out)`, float32, the scale folded in.
Factors = dict[str, KeysValues]


@dataclass(frozen=True)
class Row:
    """A row, and all that is needed of its teacher.

    Over the whole vocabulary KL(teacher || student) = `lse(z) - mean . h + constant`, for logits z
    and hidden states h of the student: the head is linear, so the teacher enters by its mean row of
    the head and by one number per target. A hundred times smaller than logits, and exact with
    `in_float32`: what 16 bits would round in z is not in the mean.

    Attributes:
        example: the tokens.
        answered: whether the answer is the user's; if not, the teacher's own.
        mean: `(n_targets, hidden)`.
        constant: `(n_targets,)`.
        nll: sum over the targets under the teacher, in nats.
    """

    example: Example
    answered: bool
    mean: np.ndarray
    constant: np.ndarray
    nll: float


class Distiller:
    """The base model, with whichever adapter is attached last."""

    def __init__(self, base: BaseModel) -> None:
        """Find the head.

        Raises:
            ModelError: the architecture scales or caps its logits.
        """
        head = find_head(base.model)
        if head is None:
            raise ModelError(
                f"{base.name}: refine needs a head that is linear in the hidden states; this"
                " architecture scales or caps its logits"
            )
        self.base, self._head = base, in_float32(head)
        self._fast = mx.default_device().type == mx.DeviceType.cpu

    def teach(
        self,
        adapter: Adapter,
        answered: ExampleSet,
        prompts: ExampleSet | None = None,
        trust: float = 0.0,
    ) -> list[Row]:
        """Rows with the adapter as their teacher: the answered ones, then the prompts.

        Args:
            adapter: attached, and left so.
            answered: rows whose targets are given.
            prompts: rows of which only the tokens up to `offset` are read; the adapter's greedy
                answer follows, at most as long as the longest of `answered`.
            trust: weight of the rows' own targets in `mean` and `constant`; the teacher has the
                rest of 1.
        """
        self.base.attach(adapter)
        examples = list(answered.examples)
        longest = max(one.n_targets for one in examples)
        for one in prompts.examples if prompts else ():
            prompt = one.asked
            examples.append(Example((*prompt, *self.base.answer(prompt, longest)), len(prompt)))
        rows: dict[int, Row] = {}
        for batch in by_length([len(one.tokens) for one in examples], _BATCH):
            some = [examples[i] for i in batch]
            hidden, targets = self._hidden(some)
            ones = mx.ones(len(targets))
            (lse, gold), (mean,) = mx.vjp(
                lambda h, targets=targets: self._scores(h, targets),
                [hidden],
                [(1 - trust) * ones, trust * ones],
            )
            constant = (mean * hidden).sum(axis=-1) - lse
            ends = np.cumsum([one.n_targets for one in some])[:-1]
            parts = (np.split(np.array(x), ends) for x in (mean, constant, lse - gold))
            for i, m, c, nll in zip(batch, *parts):
                rows[i] = Row(examples[i], i < len(answered.examples), m, c, float(nll.sum()))
        return [rows[i] for i in range(len(examples))]

    def taught(
        self,
        adapter: Adapter,
        examples: ExampleSet,
        trust: float = 0.0,
        rows: Sequence[Row] | None = None,
    ) -> ExampleSet:
        """The set with the adapter's answers as targets: a loss on it is KL(adapter || student).

        What the NLL is expected to rise by if the adapter is right, without the luck of the few
        answers at hand, of which a student may be surer than its teacher.

        Args:
            adapter: the teacher.
            examples: their own answers only say where the adapter is asked.
            trust: from 0 to 1; above 0 the loss is `(1 - trust) * KL + trust * (NLL of the rows'
                own answers minus that under the adapter)`, which may be negative.
            rows: `teach` of the same, if they are known.
        """
        rows = rows or self.teach(adapter, examples, trust=trust)
        expected = tuple(np.column_stack([row.mean, row.constant]) for row in rows)
        teacher = f"{adapter.digest} {trust!r}" if trust else adapter.digest
        return replace(examples, teacher=teacher, expected=expected)

    def compare(self, adapter: Adapter, rows: Sequence[Row]) -> np.ndarray:
        """`(n_rows, 2)`: NLL minus the teacher's, and KL(teacher || adapter), summed over targets.

        Attaches the adapter.
        """
        self.base.attach(adapter)
        sums = np.empty((len(rows), 2))
        for batch in by_length([len(row.example.tokens) for row in rows], _BATCH):
            some = [rows[i] for i in batch]
            hidden, targets = self._hidden([row.example for row in some])
            lse, gold = self._scores(hidden, targets)
            each = np.array(mx.stack([lse - gold, _divergence(hidden, lse, some)]), np.float64)
            starts = np.cumsum([0, *(row.example.n_targets for row in some[:-1])])
            sums[batch] = np.add.reduceat(each, starts, axis=1).T
        sums[:, 0] -= [row.nll for row in rows]
        return sums

    def excess(self, adapter: Adapter, rows: Sequence[Row]) -> float:
        """Mean NLL per target minus the teacher's; attaches the adapter."""
        total = float(self.compare(adapter, rows)[:, 0].sum())
        return total / sum(row.example.n_targets for row in rows)

    def gradient(
        self, factors: Factors, rows: Sequence[Row], weights: Sequence[tuple[float, float]]
    ) -> Factors:
        """Of the sum over targets of `w_nll * NLL + w_kl * KL(teacher || student)`.

        Args:
            factors: of the student, whose modules are those of the attached adapter.
            rows: what to learn from.
            weights: `(w_nll, w_kl)` of every row.
        """
        # Weights are far below 1, and in float16 so would the gradients of states be, to nothing. A
        # power of two changes no digit.
        unit = 2.0 ** math.frexp(max(map(max, weights)))[1]
        total: Factors = tree_map(mx.zeros_like, factors)
        for batch in by_length([len(row.example.tokens) for row in rows], _BATCH):
            some = [rows[i] for i in batch]
            n_targets = [row.example.n_targets for row in some]
            of_rows = np.array([weights[i] for i in batch], np.float32) / unit
            each = np.repeat(of_rows, n_targets, axis=0)
            gradient = mx.grad(self.loss)(factors, some, mx.array(each))
            total = tree_map(mx.add, total, gradient)
            mx.eval(total)
        return tree_map(lambda x: x * unit, total)

    def loss(self, factors: Factors, rows: Sequence[Row], weights: mx.array) -> mx.array:
        """What `gradient` differentiates; `weights (n_targets, 2)`."""
        with self.base.factors_replaced([factors[path] for path in self.base.occupied]):
            hidden, targets = self._hidden([row.example for row in rows])
        lse, gold = self._scores(hidden, targets)
        divergence = _divergence(hidden, lse, rows)
        return (weights[:, 0] * (lse - gold) + weights[:, 1] * divergence).sum()

    def _hidden(self, examples: Sequence[Example]) -> tuple[mx.array, mx.array]:
        """`(n_targets, hidden)` states before every target in float32, and the targets' ids."""
        x, places, targets = target_places(examples)
        return run_blocks(self.base.model, x)[places].astype(mx.float32), targets

    def _scores(self, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        """`(n_targets,)` log of the sum over the vocabulary, and logit of the target."""
        return target_scores(self._head(hidden), targets, self._fast)


def _divergence(hidden: mx.array, lse: mx.array, rows: Sequence[Row]) -> mx.array:
    """`(n_targets,)` KL(teacher || student), see `Row`."""
    mean = mx.array(np.concatenate([row.mean for row in rows]))
    constant = mx.array(np.concatenate([row.constant for row in rows]))
    return lse - (mean * hidden).sum(axis=-1) + constant
