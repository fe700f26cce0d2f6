"""Cutting rows into batches: little padding, and never more memory than allowed.

`split_rows` cuts for an evaluation, whose memory `batch_cost` estimates; `batches_by_length` cuts
by a fixed number of tokens, for gradients and captured activations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx
import numpy as np

if TYPE_CHECKING:  # Packs, which sort by key too, are read without a model.
    from d2c_mlx.models.examples import Example, ExampleSet
    from d2c_mlx.models.model import Model

K = TypeVar("K", bound=Hashable)
# Bytes of a batch of `rows` padded rows of `width` tokens after a prefix of `n_prefix`.
Cost = Callable[[int, int, int], int]

# What a batch costs beside its tokens, in tokens: small matrices are multiplied more slowly.
_OVERHEAD = 16
# Most padded tokens of a batch of several rows.
_MOST_TOKENS = 2048


def indices_by_key(keys: Iterable[K]) -> dict[K, list[int]]:
    """Map each distinct key to the indices where it occurs; both are in order of occurrence."""
    indices: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    return indices


def batch_cost(base: Model, n_logits: int | None) -> Cost:
    """An upper estimate of the bytes that one batch holds at its peak, from a model's shapes.

    Args:
        base: the base model.
        n_logits: tokens whose logits are computed at once; None is all tokens of the batch.
    """
    block = {
        path.split(".")[-1]: shape
        for path, shape in base.module_shapes.items()
        if ".layers.0." in path
    }
    hidden, vocabulary = base.dimensions
    width_of_block = max(hidden, *(width for width, _ in block.values()))
    # Of one block, per token: all linear outputs and the residual; keys and values.
    per_token = 2 * sum(out for _, out in block.values()) + width_of_block + 8 * hidden
    kv = sum(block[name][1] for name in ("k_proj", "v_proj") if name in block)
    kv = kv or 2 * width_of_block
    n_heads = int(getattr(base.model.args, "num_attention_heads", max(1, hidden // 64)))

    def cost(rows: int, width: int, n_prefix: int) -> int:
        tokens, span = rows * width, n_prefix + width
        activations = tokens * per_token + 2 * rows * span * kv
        scores = 3 * rows * n_heads * width * span
        states = n_prefix * kv * base.n_layers
        logits = 4 * min(tokens, n_logits or tokens) * vocabulary
        return base.compute_dtype.size * (activations + scores + states) + 4 * logits

    return cost


def split_rows(
    lengths: Sequence[int], n_prefix: int, cost: Cost, limit: int
) -> list[list[int]] | None:
    """Cut rows, sorted by length, where padding and overhead together cost least.

    Exact, by dynamic programming over the sorted rows.

    Args:
        lengths: tokens of every row after the prefix.
        n_prefix: tokens of the prefix.
        cost: bytes of a batch.
        limit: most bytes of one batch.

    Returns:
        Row indices of every batch, or None if the longest row alone is above the limit.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    # What the first rows cost at least, in tokens, and their batches.
    best: list[tuple[int, list[list[int]]]] = [(0, [])]
    for stop in range(1, len(order) + 1):
        width, options = lengths[order[stop - 1]], []
        for start in range(stop - 1, -1, -1):
            rows = stop - start
            too_wide = rows > 1 and rows * width > _MOST_TOKENS
            if too_wide or cost(rows, width, n_prefix) > limit:
                break
            options.append((best[start][0] + rows * width + _OVERHEAD, start))
        if not options:
            return None
        tokens, start = min(options)
        best.append((tokens, [*best[start][1], order[start:stop]]))
    return best[-1][1]


def shared_prefix(examples: ExampleSet, least: int = 4) -> tuple[int, ...]:
    """The longest common token prefix of all rows that ends before any target is predicted.

    Empty if it has fewer than `least` tokens, which are not worth a pass of their own.
    """
    rows = examples.examples
    limit = min((row.first_target for row in rows), default=1) - 1
    prefix = tuple(os.path.commonprefix([row.tokens[:limit] for row in rows]))
    return prefix if len(rows) > 1 and len(prefix) >= least else ()


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


def pad_batch(
    examples: Sequence[Example], n_prefix: int = 0
) -> tuple[mx.array, tuple[mx.array, mx.array], mx.array]:
    """Rows padded on the right, and where their targets are predicted.

    Returns:
        Token ids after the prefix, without each row's last one, `(rows, width)`; the rows and
        columns that predict a target; the targets' ids. The last three are `(n_targets,)`, examples
        in their order.
    """
    x = np.zeros((len(examples), max(len(row.tokens) for row in examples) - 1 - n_prefix), np.int32)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for i, example in enumerate(examples):
        tokens = example.tokens[n_prefix:-1]
        x[i, : len(tokens)] = tokens
        rows += [i] * example.n_targets
        columns += range(example.first_target - 1 - n_prefix, len(tokens))
        targets += example.tokens[example.first_target :]
    return mx.array(x), (mx.array(rows), mx.array(columns)), mx.array(targets)


def sums_by_row(values: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """Sums over each row's targets, `(..., rows)`, of `(..., n_targets)`."""
    starts = np.cumsum([0, *(row.n_targets for row in examples[:-1])])
    return np.add.reduceat(values, starts, axis=-1)
