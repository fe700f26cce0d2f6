"""The adapters of one base model, with the rows and the engine that measure them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.similarity import similarity
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.evaluate.workers import Workers
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet

__all__ = ["Library"]


@dataclass(frozen=True)
class Library:
    """N task adapters, N sets of calibration rows, and the engine that evaluates them.

    Attributes:
        engine: runs the base model.
        evaluator: evaluates and caches losses on the base model.
        adapters: one per task; every table has this order.
        probes: calibration rows, one set per adapter in the same order.
        answers: task -> more rows, with its adapter's own answers; they are never judged by.
    """

    engine: Engine
    evaluator: Evaluator
    adapters: Sequence[Adapter]
    probes: Sequence[ExampleSet]
    answers: Mapping[str, ExampleSet] = field(default_factory=dict)

    @property
    def base(self) -> BaseModel:
        """The base model of all adapters."""
        return self.engine.base

    @property
    def workers(self) -> Workers:
        """Threads that run the base model."""
        return self.engine.workers

    @property
    def names(self) -> list[str]:
        """Names of the adapters, which are also the names of the tasks."""
        return [adapter.name for adapter in self.adapters]

    @cached_property
    def rows(self) -> list[ExampleSet]:
        """All rows of every task: `probes`, and the answers."""
        more = [self.answers.get(adapter.name) for adapter in self.adapters]
        return [replace(one, examples=one.examples + own.examples) if own else one
                for one, own in zip(self.probes, more)]  # fmt: skip

    @cached_property
    def similarity(self) -> np.ndarray:
        """`(n, n)` cosines of the adapters' dW."""
        return similarity(self.adapters)
