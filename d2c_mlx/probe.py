"""The evaluation engine: losses of many adapters on many tasks, never the same one twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from d2c_mlx.adapter import Adapter
from d2c_mlx.files import fingerprint
from d2c_mlx.model import BaseModel
from d2c_mlx.tasks import ExampleSet

__all__ = ["Evaluator", "Job", "LossTable", "Meter", "probe_table", "tune_scale"]

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


class Evaluator:
    """Mean losses on a base model, kept on disk by content.

    A key is the hash of (base, adapter content, token ids): two equal merges share it, whatever
    they are called, and a value never depends on what else was asked. Source of the loss: mlx-lm's
    `default_loss` on the tokens that its dataset classes mark.
    """

    def __init__(self, base: BaseModel, cache: Path | None = None) -> None:
        """Open the cache file (JSON lines, appended); None keeps losses in memory only."""
        self.base = base
        self.meter: Meter = _Silent()
        self._cache = cache
        self._known = _read_cache(cache) if cache else {}

    def _key(self, adapter: Adapter | None, examples: ExampleSet) -> str:
        digest = adapter.digest if adapter else "base"
        return fingerprint([self.base.fingerprint, digest, examples.digest])[:32]

    def losses(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """Evaluate every job; what is known costs nothing.

        Args:
            jobs: pairs of an adapter (None: the bare base) and the example sets to try it on.

        Returns:
            For each job `(n_sets,)`: mean NLL per target token, in nats.
        """
        keys = [[self._key(adapter, one) for one in sets] for adapter, sets in jobs]
        pending = {
            key: one.n_tokens
            for (_, sets), row in zip(jobs, keys)
            for key, one in zip(row, sets)
            if key not in self._known
        }
        self.meter.expect(sum(pending.values()))
        width = self.base.n_streams
        for (adapter, sets), row in zip(jobs, keys):
            todo = {key: one for key, one in zip(row, sets) if key not in self._known}
            if todo:
                self.base.attach(adapter)
            missing = list(todo)
            for start in range(0, len(missing), width):
                some = missing[start : start + width]
                sums = self.base.nll([todo[key] for key in some])
                for key, total in zip(some, sums):
                    self._store(key, total / todo[key].n_targets)
                    self.meter.advance(todo[key].n_tokens)
        return [np.array([self._known[key] for key in row]) for row in keys]

    def _store(self, key: str, value: float) -> None:
        self._known[key] = value
        if self._cache:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self._cache, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")


def _read_cache(path: Path) -> dict[str, float]:
    """Known losses; a last line cut off by a kill is dropped from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return dict(json.loads(line) for line in whole.splitlines())


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
