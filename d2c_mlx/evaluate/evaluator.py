"""Losses of many adapters on many tasks, each evaluated only once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.evaluate.workers import Piece
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import AdapterError, InputError, ModelError
from d2c_mlx.utils.files import fingerprint

__all__ = ["Counts", "Evaluator", "Job", "Meter", "Runner", "Silent"]

Job = tuple[Adapter | None, Sequence[ExampleSet]]


class Meter(Protocol):
    """A progress display, in tokens."""

    def foresee(self, n_tokens: int) -> None:
        """Set the estimate of the work that is not expected yet; replaces the one before."""

    def expect(self, n_tokens: int) -> None:
        """Add work that is certain to come; it is taken from the estimate."""

    def advance(self, n_tokens: int) -> None:
        """Count work as done."""


class Silent:
    """A meter that shows nothing."""

    def foresee(self, n_tokens: int) -> None:
        """Do nothing."""

    def expect(self, n_tokens: int) -> None:
        """Do nothing."""

    def advance(self, n_tokens: int) -> None:
        """Do nothing."""


class Runner(Protocol):
    """Runs the base model: an `Engine`, or several ranks that share the work."""

    def fingerprint(self, examples: ExampleSet) -> str:
        """Hash all that decides the bits of a loss, except the adapter."""

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, float]]:
        """Yield (index of a piece, sum of its targets' NLL in nats) in the order of completion."""


@dataclass
class Counts:
    """Counts of evaluations, each of one adapter on one example set.

    Attributes:
        asked: evaluations that were asked for, cached ones included.
        done: evaluations that were run.
        tokens: tokens of the evaluations that were run, prompts included.
    """

    asked: int = 0
    done: int = 0
    tokens: int = 0


class Evaluator:
    """Mean losses on a base model, each evaluated once and cached by content.

    A cache key is the hash of engine, base model, adapter content and token ids. So two equal
    merges share a loss, whatever their names.

    The loss is that of mlx-lm's trainer, `default_loss`, on the targets of its dataset classes.
    Source: https://github.com/ml-explore/mlx-lm.
    """

    def __init__(self, runner: Runner, cache: LossCache | None = None) -> None:
        """Make an evaluator.

        Args:
            runner: runs the base model.
            cache: keeps losses; None evaluates everything again every time.
        """
        self.runner, self.cache = runner, cache
        self.meter: Meter = Silent()
        self.counts = Counts()

    def losses(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """Evaluate every job; cached losses cost nothing. Use `losses_in_parts` for few sets.

        Args:
            jobs: pairs of an adapter (None for the bare base model) and its example sets.

        Returns:
            `(n_sets,)` mean NLL per target token per job, in nats.

        Raises:
            AdapterError: a loss under an adapter is not finite.
            ModelError: a loss under the base model is not finite.
        """
        pieces = [(adapter, examples) for adapter, sets in jobs for examples in sets]
        self.counts.asked += len(pieces)
        means = iter(
            [total / rows.n_targets for total, (_, rows) in zip(self._sums(pieces), pieces)]
        )
        return [np.array([next(means) for _ in sets]) for _, sets in jobs]

    def losses_in_parts(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """Evaluate every job as `losses` does, with the parts of a set side by side.

        Use it where few sets would leave cores idle. Jobs, result and errors are those of `losses`.
        """
        parts = [[part for one in sets for part in one.parts] for _, sets in jobs]
        found = self.losses([(adapter, some) for (adapter, _), some in zip(jobs, parts)])
        result = []
        for (_, sets), some, losses in zip(jobs, parts, found):
            starts = np.cumsum([0, *(len(one.parts) for one in sets)])[:-1]
            n = np.array([part.n_targets for part in some])
            result.append(np.add.reduceat(losses * n, starts) / np.add.reduceat(n, starts))
        return result

    def _sums(self, wanted: Sequence[Piece]) -> list[float]:
        """The NLL sum of every piece, in nats."""
        keys = [self._key(*piece) for piece in wanted]
        known: dict[str, float] = {}
        missing: dict[str, Piece] = {}
        for key, piece in zip(keys, wanted):
            value = self.cache.get(key) if self.cache else None
            if value is None:
                missing[key] = piece
            else:
                known[key] = value
        names, pieces = list(missing), list(missing.values())
        self.meter.expect(sum(part.n_tokens for _, part in pieces))
        odd: dict[int, float] = {}
        for i, total in self.runner.run(pieces):
            if not math.isfinite(total):
                odd[i] = total
                continue
            known[names[i]] = total
            if self.cache:
                self.cache.put(names[i], total)
            n_tokens = pieces[i][1].n_tokens
            self.counts.done += 1
            self.counts.tokens += n_tokens
            self.meter.advance(n_tokens)
        if odd:  # Raised only now, because other ranks wait until all is done.
            first = min(odd)
            raise _overflow(odd[first], *pieces[first])
        return [known[key] for key in keys]

    def _key(self, adapter: Adapter | None, part: ExampleSet) -> str:
        digest = adapter.digest if adapter else "base"
        return fingerprint([self.runner.fingerprint(part), digest])[:32]


def _overflow(total: float, adapter: Adapter | None, part: ExampleSet) -> InputError:
    """The error for a loss that is not finite, which JSON cannot hold and nothing can compare."""
    why = f"the loss on task {part.task!r} is {total}"
    if adapter is None:
        return ModelError(
            f"the base model: {why}; its weights are damaged, or its numbers overflow"
        )
    return AdapterError(
        f"{adapter.name}: {why}: numbers overflow with it; leave it out, or train it again"
    )
