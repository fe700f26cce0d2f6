"""AdaMix: copies of a LoRA trained with random routing, then averaged into one.

Every module has several copies of A and one B. In each step it draws two copies; the rows' answers
are learned with both, and each draw is pulled towards the predictions of the other. B is shared, so
the mean of A is exactly the mean of the copies' dW.

Source: https://arxiv.org/abs/2205.12410. Its code takes the cross entropy of the first draw only;
the mean of both is the same in expectation. Its weight of the consistency, 100, multiplies a mean
over tokens and batch that is scaled differently; here both losses are nats per target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.train import Trainer, as_adapter, as_factors
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.refine.steps import Parameters, pull_back

__all__ = ["adamix_gradient", "train_adamix"]

# As published for generation.
_COPIES = 8


def train_adamix(
    trainer: Trainer, start: Adapter, rows: ExampleSet, copies: int = _COPIES,
    consistency: float = 1.0,
) -> Adapter:  # fmt: skip
    """Train copies of an adapter on the answers of some rows, and average them.

    Args:
        trainer: trains them.
        start: what all copies are at the beginning, such as a `new_lora`.
        rows: prompts with answers.
        copies: number of copies of every A.
        consistency: weight of the symmetric KL divergence of the two draws, in nats per target.

    Returns:
        The mean, of the rank of `start`.

    Raises:
        ModelError: the architecture scales or caps its logits.
    """
    rng = np.random.default_rng([trainer.options.seed, copies])

    def gradient(
        model: Distiller, parameters: Parameters, some: Sequence[TeacherRow]
    ) -> Parameters:
        draws = rng.integers(copies, size=(2, len(parameters)))
        return adamix_gradient(model, parameters, draws, some, consistency)

    factors = as_factors(start)
    many = {path: (mx.repeat(a, copies, axis=0), b) for path, (a, b) in factors.items()}
    trainer.base.attach(start)
    found = trainer.descend(many, gradient, rows, passes=3)
    mean = {path: (a.mean(axis=0, keepdims=True), b) for path, (a, b) in found.items()}
    return replace(start, modules=as_adapter("", mean).modules)


def adamix_gradient(
    model: Distiller, parameters: Factors, draws: np.ndarray, some: Sequence[TeacherRow],
    consistency: float,
) -> Factors:  # fmt: skip
    """The gradient of AdaMix' loss, in nats per target, for two draws p and q.

    The loss is `(NLL(p) + NLL(q)) / 2 + consistency * (KL(p||q) + KL(q||p)) / 2`; the first
    distribution of each KL is not differentiated.

    Args:
        model: with an adapter of these modules attached.
        parameters: module path -> a `(copies, in, r)`, b `(1, r, out)`.
        draws: `(2, n_modules)`, the copy that each draw has of every module.
        some: rows with their answers.
        consistency: see above.
    """
    made = [_drawn(parameters, draw) for draw in draws]
    answered = ExampleSet("", tuple(row.example for row in some))
    taught = [model.teacher_rows(as_adapter("", one), answered) for one in made]
    share = 0.5 / sum(row.example.n_targets for row in some)
    weights = [(share, consistency * share)] * len(some)
    total = tree_map(mx.zeros_like, parameters)
    for draw, one, teacher in zip(draws, made, reversed(taught)):
        by_factor = model.gradient(one, teacher, weights)
        found = pull_back(partial(_drawn, draw=draw), parameters, by_factor)
        total = tree_map(mx.add, total, found)
    return total


def _drawn(parameters: Factors, draw: np.ndarray) -> Factors:
    """One copy of every module."""
    return {path: (a[int(i)][None], b) for i, (path, (a, b)) in zip(draw, parameters.items())}
