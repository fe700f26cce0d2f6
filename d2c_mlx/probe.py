"""Probe evaluations: losses of many adapters on many tasks, never the same one twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from d2c_mlx.adapter import Adapter
from d2c_mlx.cache import LossCache
from d2c_mlx.files import fingerprint
from d2c_mlx.schedule import Piece
from d2c_mlx.tasks import ExampleSet

__all__ = [
    "Counts",
    "Evaluator",
    "Job",
    "LossTable",
    "Meter",
    "Runner",
    "probe_table",
    "tune_scale",
]

Job = tuple[Adapter | None, Sequence[ExampleSet]]


class Meter(Protocol):
    """What shows progress: told of tokens to come, then of tokens done."""

    def expect(self, n_tokens: int) -> None:
        """More work is known of."""

    def advance(self, n_tokens: int) -> None:
        """Work is done."""


class _Silent:
    def expect(self, n_tokens: int) -> None:
        pass

    def advance(self, n_tokens: int) -> None:
        pass


@dataclass(frozen=True)
class LossTable:
    """Mean NLL per target token, in nats, of every adapter on every task's probe examples.

    Attributes:
        tasks: task names, in row order.
        adapters: adapter names, in column order.
        values: `(n_tasks, n_adapters)`.
        base: `(n_tasks,)`, the bare base model.
    """

    tasks: tuple[str, ...]
    adapters: tuple[str, ...]
    values: np.ndarray
    base: np.ndarray

    @property
    def individual(self) -> np.ndarray:
        """`(n_tasks,)`: each task under its own adapter."""
        return np.diagonal(self.values)

    def to_json(self) -> dict[str, object]:
        """The content of `losses.json`."""
        return {
            "unit": "mean NLL per target token (nats)",
            "tasks": list(self.tasks),
            "adapters": list(self.adapters),
            "values": self.values.tolist(),
            "base": self.base.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, list]) -> LossTable:
        """Read what `to_json` wrote."""
        return cls(
            tuple(data["tasks"]),
            tuple(data["adapters"]),
            np.array(data["values"]),
            np.array(data["base"]),
        )


class Runner(Protocol):
    """What evaluates: an `Engine`, or several ranks that share the work."""

    def fingerprint(self, examples: ExampleSet) -> str:
        """Of all that decides the bits of a loss, but the adapter."""

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, float]]:
        """Yield (index of a piece, sum of its targets' NLL) as they come."""


@dataclass
class Counts:
    """Evaluations of one adapter on one example set, and the tokens of those that were done."""

    asked: int = 0
    done: int = 0
    tokens: int = 0


class Evaluator:
    """Mean losses on a base model, each evaluated once and kept by content.

    A key is the hash of (engine, base, adapter content, token ids): two equal merges share it,
    whatever they are called. Source of the loss: mlx-lm's `default_loss` on the tokens that its
    dataset classes mark.
    """

    def __init__(self, runner: Runner, cache: LossCache | None = None) -> None:
        """Evaluate with `runner`; None evaluates everything again every time."""
        self.runner, self._cache = runner, cache
        self.meter: Meter = _Silent()
        self.counts = Counts()

    def _key(self, adapter: Adapter | None, examples: ExampleSet) -> str:
        digest = adapter.digest if adapter else "base"
        return fingerprint([self.runner.fingerprint(examples), digest])[:32]

    def losses(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """Evaluate every job; what is known costs nothing.

        Args:
            jobs: pairs of an adapter (None: the bare base) and the example sets to try it on.

        Returns:
            For each job `(n_sets,)`: mean NLL per target token, in nats.
        """
        keys = [[self._key(adapter, one) for one in sets] for adapter, sets in jobs]
        known: dict[str, float | None] = {key: None for row in keys for key in row}
        if self._cache:
            known = {key: self._cache.get(key) for key in known}
        missing = {
            key: (adapter, one)
            for (adapter, sets), row in zip(jobs, keys)
            for key, one in zip(row, sets)
            if known[key] is None
        }
        names, pieces = list(missing), list(missing.values())
        self.counts.asked += sum(map(len, keys))
        self.meter.expect(sum(one.n_tokens for _, one in pieces))
        for i, total in self.runner.run(pieces):
            examples = pieces[i][1]
            known[names[i]] = loss = total / examples.n_targets
            if self._cache:
                self._cache.put(names[i], loss)
            self.counts.done += 1
            self.counts.tokens += examples.n_tokens
            self.meter.advance(examples.n_tokens)
        return [np.array([known[key] for key in row]) for row in keys]


def probe_table(
    evaluator: Evaluator, adapters: Sequence[Adapter], probes: Sequence[ExampleSet]
) -> LossTable:
    """Every adapter, and the bare base, on every task's probe examples.

    Args:
        evaluator: on the base model of the adapters.
        adapters: one per task.
        probes: one per adapter, in the same order.
    """
    jobs: list[Job] = [(None, probes), *((adapter, probes) for adapter in adapters)]
    base, *columns = evaluator.losses(jobs)
    names = tuple(adapter.name for adapter in adapters)
    return LossTable(tuple(p.task for p in probes), names, np.stack(columns, axis=1), base)


def tune_scale(loss: Callable[[float], float], grid: Sequence[float]) -> float:
    """Walk downhill on an increasing `grid` from its middle; returns the best scale found.

    A mean of near-orthogonal updates keeps about 1/T of each, so scales above 1 are common
    (facts: 1.7 for three or four, 2.0 for twelve). Ties keep the smaller scale.
    """
    known: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in known:
            known[i] = loss(grid[i])
        return known[i]

    best = len(grid) // 2
    while True:
        around = [i for i in (best - 1, best, best + 1) if 0 <= i < len(grid)]
        winner = min(around, key=lambda i: (at(i), i))
        if winner == best:
            return grid[best]
        best = winner
