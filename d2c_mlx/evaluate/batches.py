"""Cutting rows into batches: little padding, and never more memory than allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet

__all__ = [
    "BatchCost",
    "by_length",
    "default_limit",
    "shared_prefix",
    "split_rows",
    "target_places",
]

# What a batch costs beside its tokens, in tokens: small matrices are multiplied more slowly.
_OVERHEAD = 16
_LARGEST = 2048


def default_limit() -> int:
    """Bytes an evaluation may take: most of Metal's recommended working set, half the RAM else."""
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if working_set:
        return int(working_set) * 4 // 5
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@dataclass(frozen=True)
class BatchCost:
    """An upper estimate of what one batch holds at its peak, in bytes.

    Attributes:
        item: bytes of one activation.
        per_token: activations of one block per token, all linear outputs and the residual.
        kv_per_token: keys and values of one block per token.
        n_layers: number of blocks.
        n_heads: attention heads.
        vocabulary: size of the vocabulary.
        n_logits: logits computed at once, in tokens; None is all tokens of the batch.
        copies: adapters in one batch.
    """

    item: int
    per_token: int
    kv_per_token: int
    n_layers: int
    n_heads: int
    vocabulary: int
    n_logits: int | None
    copies: int = 1

    @classmethod
    def of(cls, base: BaseModel, n_logits: int | None, copies: int) -> BatchCost:
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
            copies=copies,
        )

    def __call__(self, rows: int, width: int, n_prefix: int) -> int:
        """Bytes for `rows` padded rows of `width` tokens after a prefix of `n_prefix`."""
        rows *= self.copies
        tokens, span = rows * width, n_prefix + width
        block = tokens * self.per_token + 2 * rows * span * self.kv_per_token
        scores = 3 * rows * self.n_heads * width * span
        states = self.copies * n_prefix * self.kv_per_token * self.n_layers
        logits = 4 * min(tokens, self.n_logits or tokens) * self.vocabulary
        return self.item * (block + scores + states) + 4 * logits


def split_rows(
    lengths: Sequence[int], n_prefix: int, cost: BatchCost, limit: int
) -> list[list[int]] | None:
    """Cut rows, sorted by length, into batches with as little padding as their overhead allows.

    Args:
        lengths: tokens of every row after the prefix.
        n_prefix: tokens of the prefix.
        cost: bytes of a batch.
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
            if rows > 1 and rows * width > _LARGEST:
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
    """The longest common token prefix that ends before any position that predicts a target.

    Without a token if it has fewer than `least`, which are not worth a pass of their own.
    """
    rows = examples.examples
    if len(rows) < 2:
        return ()
    limit = min(row.first_target for row in rows) - 1
    n = 0
    while n < limit and len({row.tokens[n] for row in rows}) == 1:
        n += 1
    return rows[0].tokens[:n] if n >= least else ()


def by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows, shortest first, cut where a batch would have more than `most` padded tokens.

    A row that is longer goes alone.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > most:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def target_places(
    examples: Sequence[Example],
) -> tuple[mx.array, tuple[mx.array, mx.array], mx.array]:
    """Rows padded on the right: ids `(rows, width)`, where targets are predicted, the targets.

    The places are a pair of arrays `(n_targets,)`, row and column, the examples in their order.
    """
    x = np.zeros((len(examples), max(len(one.tokens) for one in examples) - 1), np.int32)
    row: list[int] = []
    column: list[int] = []
    target: list[int] = []
    for i, one in enumerate(examples):
        x[i, : len(one.tokens) - 1] = one.tokens[:-1]
        row += [i] * one.n_targets
        column += range(one.first_target - 1, len(one.tokens) - 1)
        target += one.tokens[one.first_target :]
    return mx.array(x), (mx.array(row), mx.array(column)), mx.array(target)
