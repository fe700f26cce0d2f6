"""The engine: losses of many adapters on many examples, exact and fast.

A loss depends on nothing but the adapter and the examples: it has the same bits whatever else is
asked for, in whichever order, on however many threads or machines. That makes runs byte-identical
that were resumed, had a warm cache, or ran on several ranks. Batches therefore go over the examples
of one task and under one adapter at a time.
"""

import time
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from d2c_mlx.evaluate.batches import (
    batch_cost,
    indices_by_key,
    pad_batch,
    shared_prefix,
    split_rows,
    sums_by_row,
)
from d2c_mlx.evaluate.workers import ByteCache, Piece, make_workers
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import (
    find_head,
    full_logits,
    head_in_float32,
    run_blocks,
    run_prefix,
    wait_for,
)
from d2c_mlx.models.kernels import target_scores, use_fast_exponentials
from d2c_mlx.models.model import Model
from d2c_mlx.utils.device import arithmetic, evaluation_memory, on_cpu, wire
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.files import fingerprint

# Tokens that a shared prefix must save, about three times what a batch costs beside its tokens.
_MIN_PREFIX_SAVING = 48


class Engine:
    """Evaluates pieces (an adapter and an example set) on one base model.

    `Scorer` is the way to ask for losses: it knows a cache, and ranks besides this process.

    Attributes:
        workers: threads that run anything under the attached adapter.
        free: bytes of the limit that the base and all else in memory left at the start.
        batch_limit: bytes of one batch.
        fold: whether adapters are added to copies of the weights.
        float32_head: the head as a function of hidden states, in float32; None where the
            architecture scales or caps its logits.
    """

    def __init__(
        self,
        base: Model,
        memory_limit: int | None = None,
        n_processes: int = 1,
        limits: tuple[int, bool] | None = None,
    ) -> None:
        """Prove each optimization on the model; one that is not exact there is not used.

        Args:
            base: the base model.
            memory_limit: bytes for weights, activations and kept states; None is
                `device.evaluation_memory`.
            n_processes: number of processes that share this machine's cores and memory.
            limits: `batch_limit` and `fold` of another rank, since they decide bits; None finds
                those of this machine.
        """
        self.base = base
        self._fast = on_cpu()
        use_fast_exponentials(base.model, self._fast)
        self.workers = make_workers(n_processes)
        self._head = head = find_head(base.model)
        self.float32_head = head_in_float32(head) if head else None
        self._batches: dict[str, list[list[int]]] = {}
        self._n_logits = max(1, (1 << 24) // base.dimensions[1])
        self.memory_limit = memory_limit or evaluation_memory(n_processes)
        self.free = max(0, self.memory_limit - mx.get_active_memory())
        weights = sum(width * out for width, out in base.module_shapes.values())
        folded = weights * base.compute_dtype.size
        self.fold = base.can_fold and 3 * folded < self.free
        # Frozen states, then one batch per worker; the rest is for what MLX keeps for reuse.
        room = self.free - folded if self.fold else self.free
        self.batch_limit = room * 3 // 5 // self.workers.n
        if limits:
            self.batch_limit, self.fold = limits
        self._kept: ByteCache[list[mx.array]] = ByteCache(room // 5)
        mx.set_cache_limit(room // 5)
        mx.set_memory_limit(self.memory_limit)
        wire(self.memory_limit)

    def fingerprint(self, examples: ExampleSet) -> str:
        """Hex SHA-256 of all that decides the bits of this set's losses, but the adapter.

        That is the engine's version and the weights (`Model.fingerprint`), MLX's version, device
        and BLAS, token ids, and folding and batches, which a tight memory limit changes.
        """
        parts = [self.base.fingerprint, self.fold, [*arithmetic().values()]]
        return fingerprint([parts, examples.digest, self.batches(examples)])

    def batches(self, examples: ExampleSet) -> list[list[int]]:
        """Row indices of every batch of a set, shortest rows first.

        Raises:
            ConfigError: a row does not fit the memory limit.
        """
        key = examples.tokens_digest
        if key not in self._batches:
            n_prefix = len(self._prefix_of(examples))
            # The last token predicts nothing.
            lengths = [len(row.tokens) - n_prefix - 1 for row in examples.examples]
            cost = batch_cost(self.base, self._n_logits if self._head else None)
            cut = split_rows(lengths, n_prefix, cost, self.batch_limit)
            if cut is None:
                lacking = cost(1, max(lengths), n_prefix) - self.batch_limit
                needed = self.memory_limit + lacking * self.workers.n * 5 // 3
                raise ConfigError(
                    f"D2C_MLX_MEMORY_LIMIT: {self.memory_limit / 1e6:,.0f} MB, but the longest row"
                    f" of {examples.task} ({max(lengths) + n_prefix} tokens) needs about"
                    f" {needed / 1e6:,.0f} MB; raise the limit or shorten the row"
                )
            self._batches[key] = cut
        return self._batches[key]

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, np.ndarray]]:
        """Evaluate pieces, in an order of its own.

        Yields:
            (index of the piece, `(n_rows,)` sums over the targets of every row, in nats), each as
            soon as it is known. A sum is that of the targets' NLL, or of KL(teacher || student) for
            a set with a teacher.
        """
        digests = [adapter.digest if adapter else "base" for adapter, _ in pieces]
        for indices in indices_by_key(digests).values():
            self.base.attach(pieces[indices[0]][0], fold=self.fold)
            for j, nll in self.workers.run(self._chunk_nll, [pieces[i][1] for i in indices]):
                examples = pieces[indices[j]][1]
                order = [i for batch in self.batches(examples) for i in batch]
                sums = np.empty(len(order))
                sums[order] = sums_by_row(nll, [examples.examples[i] for i in order])
                yield indices[j], sums

    def tokens_per_second(self, sets: Sequence[ExampleSet]) -> float:
        """How fast the base model is, on the first of these sets for about a second."""
        list(self.run([(None, rows) for rows in sets[:1]]))  # prepares kernels
        started, done = time.perf_counter(), 0
        for i in range(0, len(sets), 4):
            list(self.run([(None, rows) for rows in sets[i : i + 4]]))
            done += sum(rows.n_tokens for rows in sets[i : i + 4])
            if time.perf_counter() - started > 1:
                break
        return done / (time.perf_counter() - started)

    def _chunk_nll(self, sets: Sequence[ExampleSet]) -> list[np.ndarray]:
        last: list[mx.array] = []
        pending = [self._set_nll(examples, last) for examples in sets]
        mx.eval(pending)
        return [np.array(nll, np.float64) for nll in pending]

    def _set_nll(self, examples: ExampleSet, last: list[mx.array]) -> mx.array:
        """`(n_targets,)` NLL in order of the batches, or KL(teacher || student), not yet evaluated.

        It waits for the arrays in `last`, and puts its own there, so one batch is in memory.
        """
        prefix, first = self._prefix_of(examples), self._first_block()
        batches, rows = self.batches(examples), examples.examples
        padded = [pad_batch([rows[i] for i in batch], len(prefix)) for batch in batches]
        inputs = [x for x, _, _ in padded]
        start = mx.array([prefix]) if prefix else None
        if first:
            start, inputs = self._below(examples.tokens_digest, first, start, inputs)
        states = None
        if start is not None:
            _, states = run_prefix(self.base.model, wait_for(start, last), first)
        parts, head = [], self.float32_head if examples.teacher else self._head
        for batch, x, (_, places, targets) in zip(batches, inputs, padded):
            x = wait_for(x, last)
            if head is None:
                logits = full_logits(self.base.model, x, states)[places]
                normaliser, gold = target_scores(logits, targets, self._fast)
                last[:] = [normaliser - gold]
                parts += last
                continue
            hidden = run_blocks(self.base.model, x, states, first)[places]
            teacher = [examples.teacher_targets[i] for i in batch] if examples.teacher else None
            means = mx.array(np.concatenate(teacher)) if teacher else None
            chunks: list[mx.array] = []
            for i in range(0, len(targets), self._n_logits):
                place = slice(i, i + self._n_logits)
                chunk = wait_for(hidden[place], chunks[-1:])
                normaliser, gold = target_scores(head(chunk), targets[place], self._fast)
                if means is not None:
                    gold = (means[place, :-1] * chunk).sum(axis=-1) - means[place, -1]
                chunks.append(normaliser - gold)
            last[:] = [mx.concatenate(chunks)]
            parts += last
        return mx.concatenate(parts)

    def _first_block(self) -> int:
        """Index of the first block to run per adapter; below it states are kept."""
        first = self.base.first_adapted_block
        between = self._head is not None and 0 < first < self.base.n_layers
        return first if between and self.base.runs_in_parts([first]) else 0

    def _below(
        self, digest: str, first: int, start: mx.array | None, inputs: list[mx.array]
    ) -> tuple[mx.array | None, list[mx.array]]:
        """Hidden states before block `first` of the prefix and of every batch."""
        kept = self._kept.get((digest, first))
        if kept is None:
            model, states, kept = self.base.model, None, []
            if start is not None:
                hidden, states = run_prefix(model, start, 0, first)
                kept.append(hidden)
            for x in inputs:
                kept.append(run_blocks(model, wait_for(x, kept[-1:]), states, 0, first))
            # Other threads, with streams of their own, will read them.
            mx.eval(kept)
            self._kept.put((digest, first), kept, sum(x.nbytes for x in kept))
        return (kept[0], kept[1:]) if start is not None else (None, kept)

    def _prefix_of(self, examples: ExampleSet) -> tuple[int, ...]:
        prefix = shared_prefix(examples) if self.base.runs_in_parts() else ()
        # A pass of its own must save more than it costs.
        return prefix if len(prefix) * (len(examples.examples) - 1) >= _MIN_PREFIX_SAVING else ()
