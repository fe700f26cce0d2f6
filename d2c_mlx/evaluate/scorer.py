"""Losses of many adapters on many tasks, each evaluated only once, and the regrets they give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol, cast

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.distributed import Group, Ranks
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.loss_cache import LossCache
from d2c_mlx.evaluate.workers import Piece
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import AdapterError, ModelError
from d2c_mlx.utils.files import fingerprint
from d2c_mlx.utils.progress import Progress

__all__ = ["Counts", "Job", "LossTable", "Runner", "Scorer", "normalized_regret"]


# In nats. A smaller gain counts as this much where losses are divided by it.
_LEAST_GAIN = 0.05
# A lower regret counts as this much.
_LEAST_REGRET = -1.0

Job = tuple[Adapter | None, Sequence[ExampleSet]]


class Runner(Protocol):
    """Runs a base model: an `Engine`, all ranks, or a model as on a phone."""

    def fingerprint(self, examples: ExampleSet) -> str:
        """Hash all that decides the bits of a loss, except the adapter."""

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, float]]:
        """Yield (index of a piece, sum of its targets' NLL in nats) in the order of completion."""


class Counts(NamedTuple):
    """Evaluations since a scorer was made, each of one adapter on one example set.

    Attributes:
        asked: evaluations that were asked for, cached ones included.
        done: evaluations that were run.
        tokens: tokens of the evaluations that were run, prompts included.
    """

    asked: int = 0
    done: int = 0
    tokens: int = 0

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`."""
        return Counts(*(now - then for now, then in zip(self, before)))


class Scorer:
    """Mean losses on a base model, each evaluated once and cached by content.

    A cache key is the hash of engine, base model, adapter content and token ids. So two equal
    merges share a loss, whatever their names. The loss is that of mlx-lm's trainer, `default_loss`,
    on the targets of its dataset classes. Source: https://github.com/ml-explore/mlx-lm.
    """

    def __init__(
        self,
        engine: Engine | Runner,
        cache: LossCache | None = None,
        progress: Progress | None = None,
        group: Group | None = None,
    ) -> None:
        """Make a scorer.

        Args:
            engine: runs the base model here; any `Runner` where only losses are asked for.
            cache: keeps losses; None keeps none.
            progress: shows how far the work is; None shows nothing.
            group: ranks that share the work, all of which load the base model now; None is this
                process alone.
        """
        self.engine, self.cache = cast(Engine, engine), cache
        self.progress = progress or Progress()
        self._runner: Runner = Ranks(self.engine, group) if group else engine
        self._counts = Counts()

    @property
    def counts(self) -> Counts:
        """Evaluations since the scorer was made; they only grow."""
        return self._counts

    def losses(self, jobs: Sequence[Job], in_parts: bool = False) -> list[np.ndarray]:
        """Evaluate every job; cached losses cost nothing.

        Args:
            jobs: pairs of an adapter (None for the bare base model) and its example sets.
            in_parts: evaluate the parts of a set side by side. Use it where few sets would leave
                cores idle.

        Returns:
            `(n_sets,)` mean NLL per target token per job, in nats.

        Raises:
            AdapterError: a loss under an adapter is not finite.
            ModelError: a loss under the base model is not finite.
        """

        def parts_of(examples: ExampleSet) -> Sequence[ExampleSet]:
            return examples.parts if in_parts else (examples,)

        pieces = [
            (adapter, part)
            for adapter, sets in jobs
            for examples in sets
            for part in parts_of(examples)
        ]
        keys = []
        for adapter, part in pieces:
            about = [self._runner.fingerprint(part), adapter.digest if adapter else "base"]
            keys.append(fingerprint(about)[:32])
        cached = {key: self.cache.get(key) if self.cache else None for key in keys}
        totals = {key: total for key, total in cached.items() if total is not None}
        missing = {key: piece for key, piece in zip(keys, pieces) if key not in totals}
        names, todo = list(missing), list(missing.values())
        self.progress.expect(sum(part.n_tokens for _, part in todo))
        tokens = 0
        for i, total in self._runner.run(todo):
            totals[names[i]] = total
            if self.cache and math.isfinite(total):
                self.cache.put(names[i], total)
            tokens += todo[i][1].n_tokens
            self.progress.advance(todo[i][1].n_tokens)
        more = len(pieces), len(todo), tokens
        self._counts = Counts(*(before + n for before, n in zip(self._counts, more)))
        # Only now, because other ranks wait until all is done.
        for name, (adapter, part) in missing.items():
            if math.isfinite(totals[name]):
                continue
            why = f"the loss on task {part.task!r} is {totals[name]}"
            if adapter is None:
                raise ModelError(
                    f"the base model: {why}; its weights are damaged, or its numbers overflow"
                )
            raise AdapterError(
                f"{adapter.name}: {why}: numbers overflow with it; leave it out, or train it again"
            )
        sums = (totals[key] for key in keys)

        def mean(examples: ExampleSet) -> float:
            return sum(next(sums) for _ in parts_of(examples)) / examples.n_targets

        return [np.array([mean(examples) for examples in sets]) for _, sets in jobs]


def normalized_regret(losses: np.ndarray, own: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Bring losses to a scale that tasks share: 0 at the task adapter, 1 at the base model.

    A gain counts as at least 0.05 nats, so that an adapter that hardly helps does not outvote the
    others. A regret is at least -1: an adapter worse than the base model would outvote them too,
    since any merge that undoes it is many such gains better. Use `LossTable.regret` where there is
    a table.

    Args:
        losses: `(n_tasks,)` or `(n_tasks, k)`, in nats per target token.
        own: `(n_tasks,)` losses under the task adapters, in the same unit.
        base: `(n_tasks,)` losses under the bare base model, in the same unit.

    Returns:
        Regrets in the shape of `losses`, without a unit.
    """
    wide = (slice(None),) + (None,) * (losses.ndim - 1)
    regrets = (losses - own[wide]) / np.maximum(base - own, _LEAST_GAIN)[wide]
    return np.maximum(regrets, _LEAST_REGRET)


@dataclass(frozen=True)
class LossTable:
    """Mean NLL per target token, in nats, on the tasks' calibration rows.

    It is pure data: it converts losses to regrets and measures nothing. `measure_losses` of
    merge/library.py makes one.

    Attributes:
        tasks: task names.
        individual: `(n_tasks,)` losses of each task under its task adapter.
        base: `(n_tasks,)` losses under the bare base model.
        strengths: `(s,)` factors on dW at which task adapters were measured, rising; may be empty.
        weakened: `(n_tasks, s)` losses of each task under its task adapter at these strengths.
    """

    tasks: tuple[str, ...]
    individual: np.ndarray
    base: np.ndarray
    strengths: tuple[float, ...] = ()
    weakened: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @cached_property
    def gain(self) -> np.ndarray:
        """`(n_tasks,)` nats that each task adapter gains over the base model, at least 0.05."""
        return np.maximum(self.base - self.individual, _LEAST_GAIN)

    def regret(self, losses: np.ndarray, tasks: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Convert losses to regrets by `normalized_regret`, with this table's losses at 0 and 1.

        Args:
            losses: `(n,)` or `(n, k)`, in nats per target token.
            tasks: `(n,)` indices of the tasks of the rows.

        Returns:
            Regrets in the shape of `losses`.
        """
        return normalized_regret(losses, self.individual[tasks], self.base[tasks])

    def to_json(self) -> dict[str, object]:
        """The content of `losses.json`."""
        return {
            "unit": "mean NLL per target token (nats)",
            "tasks": list(self.tasks),
            "individual": self.individual.tolist(),
            "base": self.base.tolist(),
            "strengths": list(self.strengths),
            "weakened": self.weakened.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, list]) -> LossTable:
        """Make a table from the content that `to_json` gave."""
        return cls(
            tuple(data["tasks"]),
            np.array(data["individual"]),
            np.array(data["base"]),
            tuple(data["strengths"]),
            np.array(data["weakened"]).reshape(len(data["tasks"]), -1),
        )
