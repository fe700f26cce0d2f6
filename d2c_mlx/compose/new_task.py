"""A task that has no adapter yet, and what one can be made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.evaluator import Evaluator
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet

__all__ = ["NewTask"]

# Rows -> a LoRA that was trained on them.
Train = Callable[[ExampleSet], Adapter]


@dataclass(frozen=True)
class NewTask:
    """What a method makes an adapter of, besides the rows that it is given.

    Attributes:
        name: name of the task, and of every adapter that is made for it.
        base: the base model.
        evaluator: evaluates and caches losses on the base model.
        library: the adapters to compose from, at least one.
        fresh: trains a LoRA on rows; for the same rows it is trained once.
        similarity: `(n,)` cosines of the new task's prompts with those of each adapter's tasks;
            None where the prompts of the library are not known.
        seed: seed of all random choices.
    """

    name: str
    base: BaseModel
    evaluator: Evaluator
    library: Sequence[Adapter]
    fresh: Train
    similarity: np.ndarray | None = None
    seed: int = 0

    def losses(self, adapters: Sequence[Adapter | None], rows: ExampleSet) -> np.ndarray:
        """Mean NLL per target token of each adapter on some rows, `(n,)` in nats.

        Args:
            adapters: None is the base model.
            rows: evaluated in their parts, each of which is cached.
        """
        jobs = [(one, [rows]) for one in adapters]
        return np.concatenate(self.evaluator.losses_in_parts(jobs))
