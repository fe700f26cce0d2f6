"""Cutting rows into batches: little padding, and never more memory than allowed.

`split_rows` cuts for an evaluation, whose memory `BatchCost` estimates; `batches_by_length` cuts by
a fixed number of tokens, for gradients and captured activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.forward import KeysValues

__all__ = [
    "Batch",
    "BatchCost",
    "batches_by_length",
    "pad_batch",
    "pad_inputs",
    "shared_prefix",
    "split_rows",
]


# What a batch costs beside its tokens, in tokens: small matrices are multiplied more slowly.
_OVERHEAD = 16
# Most padded tokens of a batch of several rows.
_MOST_TOKENS = 2048


@dataclass(frozen=True)
class BatchCost:
    """An upper estimate of the bytes that one batch holds at its peak.

    Attributes:
        item: bytes of one activation.
        per_token: activations of one block per token, all linear outputs and the residual.
        kv_per_token: keys and values of one block per token.
        n_layers: number of blocks.
        n_heads: number of attention heads.
        vocabulary: size of the vocabulary.
        n_logits: tokens whose logits are computed at once; None is all tokens of the batch.
    """

    item: int
    per_token: int
    kv_per_token: int
    n_layers: int
    n_heads: int
    vocabulary: int
    n_logits: int | None

    @classmethod
    def of(cls, base: BaseModel, n_logits: int | None) -> BatchCost:
        """Read the dimensions off the model's modules."""
        block = {
            path.split(".")[-1]: shape
            for path, shape in base.module_shapes.items()
            if ".layers.0." in path
        }
        hidden, vocabulary = base.dimensions
        width = max(hidden, *(w for w, _ in block.values()))
        outputs = sum(out for _, out in block.values())
        kv = sum(block[name][1] for name in ("k_proj", "v_proj") if name in block) or 2 * width
        heads = int(getattr(base.model.args, "num_attention_heads", max(1, hidden // 64)))
        return cls(
            item=base.compute_dtype.size,
            per_token=2 * outputs + width + 8 * hidden,
            kv_per_token=kv,
            n_layers=base.n_layers,
            n_heads=heads,
            vocabulary=vocabulary,
            n_logits=n_logits,
        )

    def __call__(self, rows: int, width: int, n_prefix: int) -> int:
        """Bytes for `rows` padded rows of `width` tokens after a prefix of `n_prefix`."""
        tokens, span = rows * width, n_prefix + width
        block = tokens * self.per_token + 2 * rows * span * self.kv_per_token
        scores = 3 * rows * self.n_heads * width * span
        states = n_prefix * self.kv_per_token * self.n_layers
        logits = 4 * min(tokens, self.n_logits or tokens) * self.vocabulary
        return self.item * (block + scores + states) + 4 * logits


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one set, ready to run under the attached adapter.

    Attributes:
        rows: the examples.
        teacher_targets: see `ExampleSet`; empty without a teacher.
        x: token ids of the rows, or their hidden states before block `first`.
        n_prefix: tokens of the shared prefix, which are not in `x`.
        states: keys and values of the prefix, for every block from `first` on.
        first: index of the first block to run.
    """

    rows: Sequence[Example]
    teacher_targets: Sequence[np.ndarray]
    x: mx.array
    n_prefix: int
    states: list[KeysValues] | None
    first: int

    def target_places(self) -> tuple[mx.array, mx.array, mx.array]:
        """Rows and columns of `x` that predict a target, and the targets' token ids."""
        row, column, target = [], [], []
        for i, example in enumerate(self.rows):
            positions = range(example.first_target, len(example.tokens))
            row += [i] * len(positions)
            column += [t - 1 - self.n_prefix for t in positions]
            target += [example.tokens[t] for t in positions]
        return mx.array(row), mx.array(column), mx.array(target)


def split_rows(
    lengths: Sequence[int], n_prefix: int, cost: BatchCost, limit: int
) -> list[list[int]] | None:
    """Cut rows, sorted by length, where padding and overhead together cost least.

    Exact, by dynamic programming over the sorted rows.

    Args:
        lengths: tokens of every row after the prefix.
        n_prefix: tokens of the prefix.
        cost: estimates the bytes of a batch.
        limit: most bytes of one batch.

    Returns:
        Row indices of every batch, or None if the longest row alone is above the limit.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    best, cut = [0.0], [0]
    for stop in range(1, len(order) + 1):
        width = lengths[order[stop - 1]]
        options = []
        for start in range(stop - 1, -1, -1):
            rows = stop - start
            if rows > 1 and rows * width > _MOST_TOKENS:
                break
            if cost(rows, width, n_prefix) > limit:
                break
            options.append((best[start] + rows * width + _OVERHEAD, start))
        if not options:
            return None
        value, start = min(options)
        best.append(value)
        cut.append(start)
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.insert(0, order[cut[stop] : stop])
        stop = cut[stop]
    return batches


def shared_prefix(examples: ExampleSet, least: int = 4) -> tuple[int, ...]:
    """The longest common token prefix of all rows that ends before any target is predicted.

    Empty if it has fewer than `least` tokens, which are not worth a pass of their own.
    """
    rows = examples.examples
    if len(rows) < 2:
        return ()
    limit = min(row.first_target for row in rows) - 1
    n = 0
    while n < limit and len({row.tokens[n] for row in rows}) == 1:
        n += 1
    return rows[0].tokens[:n] if n >= least else ()


def batches_by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, cut where a batch would exceed `most` padded tokens.

    A row that is longer makes a batch alone. `split_rows` pads less and heeds memory.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > most:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def pad_inputs(examples: Sequence[Example], n_prefix: int) -> np.ndarray:
    """Token ids after the prefix, without the last one, `(rows, width)`, padded on the right."""
    rows = [example.tokens[n_prefix:-1] for example in examples]
    x = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        x[i, : len(row)] = row
    return x


def pad_batch(examples: Sequence[Example]) -> tuple[mx.array, tuple[mx.array, mx.array], mx.array]:
    """Pad whole examples on the right, for a pass with a gradient.

    Returns:
        Token ids `(rows, width)`; a pair of arrays `(n_targets,)`, the row and column of every
        position that predicts a target, examples in their order; the targets' ids `(n_targets,)`.
    """
    row: list[int] = []
    column: list[int] = []
    target: list[int] = []
    for i, one in enumerate(examples):
        row += [i] * one.n_targets
        column += range(one.first_target - 1, len(one.tokens) - 1)
        target += one.tokens[one.first_target :]
    return mx.array(pad_inputs(examples, 0)), (mx.array(row), mx.array(column)), mx.array(target)
