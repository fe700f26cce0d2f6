"""Training on the rows of a new task: a LoRA, or numbers that make the factors of one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.refine.steps import Parameters, descend, pull_back, turns
from d2c_mlx.utils.environment import all_cores
from d2c_mlx.utils.progress import Progress

__all__ = ["TrainOptions", "Trainer", "as_adapter", "as_factors", "new_lora"]

# A training step in forward passes of its tokens, for the progress display.
_STEP = 3

# (model, parameters, rows of the step) -> the gradient, in the form of the parameters.
Gradient = Callable[[Distiller, Parameters, Sequence[TeacherRow]], Parameters]


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training.

    Attributes:
        steps: number of steps.
        rate: highest learning rate of Adam, see `steps.descend`.
        rows: rows of a step.
        seed: seed of the order of the rows.
    """

    steps: int = 25
    rate: float = 5e-3
    rows: int = 2
    seed: int = 0


def new_lora(name: str, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int = 0) -> Adapter:
    """A LoRA before its training: `a` uniform within 1 / sqrt(in), as mlx-lm draws it, `b` zero.

    Args:
        name: the adapter's name.
        shapes: module path -> (in, out).
        rank: of every module.
        seed: every module draws its own numbers.
    """
    modules = {}
    for path, (width, out) in sorted(shapes.items()):
        rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
        a = rng.uniform(-1, 1, (width, rank)) / np.sqrt(width)
        modules[path] = LoRA(mx.array(a.astype(np.float32)), mx.zeros((rank, out)))
    return Adapter(name, modules)


def as_factors(adapter: Adapter) -> Factors:
    """The factors of an adapter, as `Distiller.gradient` takes them."""
    factors: Factors = {}
    for path, lora in sorted(adapter.modules.items()):
        a, b = lora.factors()
        factors[path] = mx.array(a)[None], mx.array(b)[None]
    return factors


def as_adapter(name: str, factors: Factors) -> Adapter:
    """The adapter of these factors; `as_factors` turned round."""
    return Adapter(name, {path: LoRA(a[0], b[0]) for path, (a, b) in factors.items()})


@dataclass(frozen=True)
class Trainer:
    """Trains on one base model; on one machine always to the same bytes.

    Attributes:
        base: base model; an adapter stays attached.
        options: how to train.
        progress: shows progress.
    """

    base: BaseModel
    options: TrainOptions = TrainOptions()
    progress: Progress = field(default_factory=Progress)

    def lora(self, start: Adapter, rows: ExampleSet) -> Adapter:
        """Train an adapter from `start` on, such as a `new_lora` or a mix; see `fit`."""
        factors = self.fit(as_factors(start), lambda factors: factors, rows)
        return replace(start, modules=as_adapter("", factors).modules)

    def fit(
        self, start: Parameters, make: Callable[[Parameters], Factors], rows: ExampleSet
    ) -> Parameters:
        """Train numbers that factors are made of, on the mean NLL per target of the rows' answers.

        Args:
            start: the numbers at the beginning.
            make: makes the factors, by operations of MLX.
            rows: prompts with answers.

        Raises:
            ModelError: the architecture scales or caps its logits.
        """

        def gradient(
            model: Distiller, parameters: Parameters, step: Sequence[TeacherRow]
        ) -> Parameters:
            share = 1 / sum(row.example.n_targets for row in step)
            by_factor = model.gradient(make(parameters), step, [(share, 0.0)] * len(step))
            return pull_back(make, parameters, by_factor)

        self.base.attach(as_adapter("", make(start)))
        return self.descend(start, gradient, rows)

    def descend(
        self, parameters: Parameters, gradient: Gradient, rows: ExampleSet, passes: int = 1
    ) -> Parameters:
        """Follow a gradient for all steps.

        Args:
            parameters: the numbers at the beginning.
            gradient: of the rows of a step.
            rows: prompts with answers.
            passes: how often `gradient` runs the rows forwards and backwards.
        """
        o, model = self.options, Distiller(self.base)
        own = model.own_rows(rows)
        order = turns(own, o.rows, (o.seed,))
        cost = passes * _STEP * min(o.rows, len(own)) * rows.n_tokens // len(own)
        self.progress.expect(o.steps * cost)
        steps = descend(parameters, lambda now: gradient(model, now, next(order)), o.steps, o.rate)
        with all_cores():
            for step in steps:
                parameters = step
                self.progress.advance(cost)
        return parameters
