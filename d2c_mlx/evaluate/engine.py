"""Losses of many adapters on many examples, exact and fast: every saving can be switched off.

A value depends on nothing but the adapter and the examples: the same bits whatever else is asked,
in whichever order, on however many threads or machines. (Except with `stack` above 1.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from d2c_mlx.evaluate.batches import BatchCost, default_limit, shared_prefix, split_rows
from d2c_mlx.evaluate.workers import Kept, Piece, groups, workers_here
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.forward import (
    KeysValues,
    after,
    find_head,
    full_logits,
    in_float32,
    prefix_is_exact,
    run_blocks,
    run_prefix,
    split_is_exact,
    tiled,
)
from d2c_mlx.models.kernels import target_scores, use_exponentials
from d2c_mlx.utils.device import arithmetic
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.files import fingerprint

__all__ = ["Engine", "Savings"]

# Tokens that a shared prefix must save, about three times what a batch costs beside its tokens.
_WORTH = 48


@dataclass(frozen=True)
class Savings:
    """What the engine may save; each changes a loss by rounding only.

    Attributes:
        head: logits at target positions only.
        prefix: the tokens that all rows of a set begin with, once per adapter.
        batches: several rows at once, sorted by length; else row by row.
        frozen: blocks below the first that an adapter touches, once per set.
        fold: float32 adapters added to copies of the weights, else beside them.
        streams: on a CPU device one set per core side by side, else one set on all cores.
        exponentials: on a CPU device the faster ones of activations.py.
        stack: adapters in one batch.
    """

    head: bool = True
    prefix: bool = True
    batches: bool = True
    frozen: bool = True
    fold: bool = True
    streams: bool = True
    exponentials: bool = True
    stack: int = 1


class Engine:
    """Evaluates pieces (an adapter and an example set) on one base model.

    Attributes:
        base: the model.
        workers: threads for anything that the attached adapter is to be run on.
        savings: those asked for.
        memory_limit: bytes.
        batch_limit: bytes of one batch.
        fold: whether adapters are added to copies of the weights.
        separate: the head as a function of hidden states, in float32; None where logits are scaled
            or capped.
    """

    def __init__(
        self,
        base: BaseModel,
        memory_limit: int | None = None,
        savings: Savings | None = None,
        n_processes: int = 1,
    ) -> None:
        """Prove each saving on the model; what is not exact there is not used.

        Args:
            base: the model.
            memory_limit: bytes for weights, activations and kept states; None is the device's.
            savings: None is all that pay.
            n_processes: how many share this machine's cores and memory.
        """
        self.base, self.savings = base, savings or Savings()
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        self._fast = on_cpu and self.savings.exponentials
        use_exponentials(base.model, self._fast)
        self.workers = workers_here(self.savings.streams, n_processes)
        head = find_head(base.model)
        self.separate = in_float32(head) if head else None
        self._head = head if self.savings.head else None
        self._prefix = self.savings.prefix and prefix_is_exact(base.model)
        self._split: dict[int, bool] = {}
        self._batches: dict[str, list[list[int]]] = {}
        _, vocabulary = base.dimensions
        self._n_logits = max(1, (1 << 24) // vocabulary)
        self.memory_limit = memory_limit or default_limit() // n_processes
        self._free = free = max(0, self.memory_limit - mx.get_active_memory())
        weights = sum(width * out for width, out in base.module_shapes.values())
        folded = weights * base.compute_dtype.size
        savings = self.savings
        self.fold = savings.fold and base.folds and 3 * folded < free
        if self.fold:
            free -= folded
        # Frozen states, then one batch per worker; the rest is for what MLX keeps for reuse.
        self._kept = Kept(free // 5)
        self.batch_limit = free * 3 // 5 // self.workers.n
        mx.set_cache_limit(free // 5)
        mx.set_memory_limit(self.memory_limit)
        # Metal's alone: what is wired is not paged out and in again between batches.
        if most := mx.device_info().get("max_recommended_working_set_size"):
            mx.set_wired_limit(min(int(most), self.memory_limit))

    def fingerprint(self, examples: ExampleSet) -> str:
        """Hex SHA-256 of all that decides the bits of this set's losses, but the adapter."""
        savings = dataclasses.asdict(self.savings) | {"fold": self.fold}
        parts = [self.base.fingerprint, savings, arithmetic()]
        return fingerprint([parts, examples.digest, self.batches(examples)])

    def batches(self, examples: ExampleSet) -> list[list[int]]:
        """Row indices of every batch of a set, shortest rows first.

        Raises:
            ConfigError: a row does not fit the memory limit.
        """
        if examples.tokens_digest not in self._batches:
            n_prefix = len(self._prefix_of(examples))
            # The last token predicts nothing.
            lengths = [len(row.tokens) - n_prefix - 1 for row in examples.examples]
            copies = self.savings.stack
            cost = BatchCost.of(self.base, self._n_logits if self._head else None, copies)
            cut = split_rows(lengths, n_prefix, cost, self.batch_limit)
            if cut is None:
                needed = cost(1, max(lengths), n_prefix) * self.workers.n * 5 // 3
                needed += self.memory_limit - self._free
                raise ConfigError(
                    f"memory_limit: {self.memory_limit / 1e6:,.0f} MB, but the longest row of"
                    f" {examples.task} ({max(lengths) + n_prefix} tokens) needs about"
                    f" {needed / 1e6:,.0f} MB with the model; raise the limit or shorten the row"
                )
            if not self.savings.batches:
                cut = [[i] for batch in cut for i in batch]
            self._batches[examples.tokens_digest] = cut
        return self._batches[examples.tokens_digest]

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, float]]:
        """Evaluate; yields (index of the piece, sum over its targets in nats) as they come.

        The sum is that of the targets' NLL; of a set with a teacher, of KL(teacher || student).
        """
        for group in groups(pieces, self.savings.stack):
            alone = len(group) == 1
            self.base.attach(*(pieces[i][0] for i, *_ in group), fold=self.fold and alone)
            columns = list(zip(*group))
            sets = [pieces[column[0]][1] for column in columns]
            for j, nll in self.workers.run(partial(self._lot_nll, len(group)), sets):
                yield from zip(columns[j], nll)

    def _lot_nll(self, copies: int, sets: Sequence[ExampleSet]) -> list[list[float]]:
        """For each set the NLL sum under every attached adapter."""
        last: list[mx.array] = []
        pending = [self._set_nll(one, copies, last) for one in sets]
        mx.eval(pending)
        return [np.array(nll, np.float64).sum(axis=1).tolist() for nll in pending]

    def _set_nll(self, examples: ExampleSet, copies: int, last: list[mx.array]) -> mx.array:
        """`(copies, n_targets)` NLL, not yet evaluated.

        Args:
            examples: the set.
            copies: number of attached adapters.
            last: what to wait for, updated: batches run one after the other, so that only one is
                in memory.
        """
        prefix, batches = self._prefix_of(examples), self.batches(examples)
        first = self._first_block()
        rows = [[examples.examples[i] for i in batch] for batch in batches]
        inputs = [mx.array(self._tokens(batch, len(prefix))) for batch in rows]
        start = mx.array([prefix]) if prefix else None
        if first:
            start, inputs = self._below(examples, first, start, inputs, last)
        states = None
        if start is not None:
            _, states = run_prefix(self.base.model, tiled(start, copies, last), first)
        parts = []
        for batch, some, x in zip(batches, rows, inputs):
            x = tiled(x, copies, last)
            expected = [examples.expected[i] for i in batch] if examples.teacher else []
            nll = self._batch_nll(some, expected, x, copies, len(prefix), states, first)
            last[:] = [nll]
            parts.append(nll.reshape(copies, -1))
        return mx.concatenate(parts, axis=1)

    def _first_block(self) -> int:
        """Index of the first block to run per adapter; below it states are kept."""
        first = self.base.first_touched
        if not self.savings.frozen or self._head is None or not 0 < first < self.base.n_layers:
            return 0
        if first not in self._split:
            self._split[first] = split_is_exact(self.base.model, first)
        return first if self._split[first] else 0

    def _below(
        self,
        examples: ExampleSet,
        first: int,
        start: mx.array | None,
        inputs: list[mx.array],
        last: list[mx.array],
    ) -> tuple[mx.array | None, list[mx.array]]:
        """Hidden states before block `first` of the prefix and of every batch."""
        key = examples.tokens_digest, first
        kept = self._kept.get(key)
        if kept is None:
            model, states, kept = self.base.model, None, []
            if start is not None:
                hidden, states = run_prefix(model, tiled(start, 1, last), 0, first)
                kept.append(hidden)
            for x in inputs:
                kept.append(run_blocks(model, tiled(x, 1, last), states, 0, first))
                last[:] = kept[-1:]
            # Other threads, with streams of their own, will read them.
            mx.eval(kept)
            self._kept.put(key, kept)
        return (kept[0], kept[1:]) if start is not None else (None, kept)

    def _batch_nll(
        self,
        batch: Sequence[Example],
        expected: Sequence[np.ndarray],
        x: mx.array,
        copies: int,
        n_prefix: int,
        states: list[KeysValues] | None,
        first: int,
    ) -> mx.array:
        """`(copies * n_targets,)` NLL of the batch's targets, one adapter after the other.

        Where a teacher's answers are `expected`, KL(teacher || student) instead.
        """
        row, column, target = [], [], []
        for i, example in enumerate(batch):
            positions = range(example.first_target, len(example.tokens))
            row += [i] * len(positions)
            column += [t - 1 - n_prefix for t in positions]
            target += [example.tokens[t] for t in positions]
        n = len(target)
        rows = mx.array([copy * len(batch) + i for copy in range(copies) for i in row])
        columns, targets = mx.array(column * copies), mx.array(target * copies)
        head = self.separate if expected else self._head
        if head is None:
            logits = full_logits(self.base.model, x, states)[rows, columns]
            normaliser, gold = target_scores(logits, targets, self._fast)
            return normaliser - gold
        hidden = run_blocks(self.base.model, x, states, first)[rows, columns]
        means = mx.array(np.concatenate([*expected] * copies)) if expected else None
        parts: list[mx.array] = []
        for i in range(0, n * copies, self._n_logits):
            place = slice(i, i + self._n_logits)
            some = after(hidden[place], parts[-1:])
            normaliser, gold = target_scores(head(some), targets[place], self._fast)
            if means is not None:
                gold = (means[place, :-1] * some).sum(axis=-1) - means[place, -1]
            parts.append(normaliser - gold)
        return mx.concatenate(parts)

    def _prefix_of(self, examples: ExampleSet) -> tuple[int, ...]:
        prefix = shared_prefix(examples) if self._prefix else ()
        # A pass of its own, on few tokens, must save more than it costs.
        return prefix if len(prefix) * (len(examples.examples) - 1) >= _WORTH else ()

    def _tokens(self, batch: Sequence[Example], n_prefix: int) -> np.ndarray:
        """`(rows, width)` token ids after the prefix, padded on the right."""
        width = max(len(example.tokens) for example in batch) - n_prefix - 1
        x = np.zeros((len(batch), width), np.int32)
        for i, example in enumerate(batch):
            inputs = example.tokens[n_prefix:-1]
            x[i, : len(inputs)] = inputs
        return x
