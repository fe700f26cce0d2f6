"""A fresh LoRA: trained on the rows of a new task alone, or on from an adapter that exists."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distill import Distiller, Factors
from d2c_mlx.evaluate.evaluator import Meter, Silent
from d2c_mlx.merge.refine import schedule, turns
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.blas import all_cores

__all__ = ["TrainOptions", "new_lora", "train_lora"]

# A training step in forward passes of its tokens, for the progress display.
_STEP = 3


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training.

    Attributes:
        steps: number of steps.
        rate: highest learning rate of Adam, see `refine.schedule`.
        rows: rows of a step.
        seed: seed of the order of the rows.
    """

    steps: int = 30
    rate: float = 2e-3
    rows: int = 4
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


def train_lora(
    base: BaseModel,
    start: Adapter,
    rows: ExampleSet,
    options: TrainOptions | None = None,
    meter: Meter | None = None,
) -> Adapter:
    """Train an adapter on the answers of some rows; on one machine always to the same bytes.

    Args:
        base: base model; an adapter stays attached.
        start: where to begin, such as a `new_lora` or a mix.
        rows: prompts with answers; the loss is their mean NLL per target token.
        options: how to train; None takes the defaults.
        meter: shows progress; None shows nothing.

    Raises:
        ModelError: the architecture scales or caps its logits.
    """
    o, meter = options or TrainOptions(), meter or Silent()
    model = Distiller(base)
    own = model.own_rows(rows)
    order = turns(own, o.rows, (o.seed,))
    cost = _STEP * min(o.rows, len(own)) * rows.n_tokens // len(own)
    meter.expect(o.steps * cost)
    optimizer = optim.Adam(schedule(o.steps, o.rate), betas=[0.9, 0.99], bias_correction=True)
    factors: Factors = {}
    for path, lora in sorted(start.modules.items()):
        a, b = lora.factors()
        factors[path] = mx.array(a)[None], mx.array(b)[None]
    with all_cores():
        base.attach(start)
        for _ in range(o.steps):
            some = next(order)
            share = 1 / sum(row.example.n_targets for row in some)
            gradient = model.gradient(factors, some, [(share, 0.0)] * len(some))
            gradient, _ = optim.clip_grad_norm(gradient, 1.0)
            factors = optimizer.apply_gradients(gradient, factors)
            mx.eval(factors, optimizer.state)
            meter.advance(cost)
    modules = {path: LoRA(a[0], b[0]) for path, (a, b) in factors.items()}
    return replace(start, modules=modules)
