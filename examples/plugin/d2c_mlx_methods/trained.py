"""Methods of papers that train something else than a LoRA on the rows, and give one LoRA.

- Learnable calibration corrects a frozen merge of two adapters that act at once by a small
  projection beside it, one pair P1, P2 per type of module, shared by all layers (the variant ++).
  Neither paper says where P starts; here the update does at zero, as a LoRA's. The variant that
  trains a bias has no LoRA form. https://arxiv.org/abs/2507.16083,
  https://arxiv.org/abs/2510.13848.
- Multi-head routing mixes adapters, the skills, by trained weights per module and block of
  features. Here it mixes updates; the paper and PEFT's Poly layer mix A and B apart, so that cross
  terms A_i B_j appear. https://arxiv.org/abs/2211.03831 (MHR), https://arxiv.org/abs/2202.13914.
- AdaMix trains several copies of every A with one B, and averages them. In each step a module draws
  two copies; both learn the rows' answers, and each draw is pulled towards the predictions of the
  other. B is shared, so the mean of A is exactly the mean of the copies' dW. Its code takes the
  cross entropy of the first draw only; the mean of both is the same in expectation. Its weight of
  the consistency, 100, multiplies a mean over tokens and batch that is scaled differently; here
  both losses are nats per target. https://arxiv.org/abs/2205.12410.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.methods import NewTask, as_adapter, as_factors, new_lora
from d2c_mlx.evaluate.distill import Distiller, Factors, TeacherRow
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import KeysValues
from d2c_mlx.refine.refine import Parameters, pull_back

__all__ = [
    "adamix_gradient", "block_weights", "calibrate", "fold", "route", "train_adamix",
    "train_routing", "weighted_blocks",
]  # fmt: skip

# As in PEFT, so that weights of which all are nearly zero do not divide by it.
_EPS = 1e-12
# Learning rate of the weights of routing, as published.
_ROUTING_RATE = 0.1
# Logits of routing at the start are uniform within this, and the most blocks of features.
_START, _N_BLOCKS = 1e-3, 8

# a `(s, in, r)` and b `(s, r, out)` of s skills, and weights `(q, s)` -> a `(in, R)`, b `(R, out)`.
Route = Callable[[KeysValues, mx.array], KeysValues]


def calibrate(task: NewTask, merge: Adapter, rows: ExampleSet, rank: int = 4) -> Adapter:
    """Train the projections of a merge on rows of the joint task, and fold them.

    Args:
        task: trains them.
        merge: of the two adapters.
        rows: prompts with answers that need both.
        rank: s, of every projection; 4 as published.

    Returns:
        One LoRA whose rank is that of the merge + s.
    """
    frozen = as_factors(merge)
    shapes = {_kind(path, a, b): (a.shape[1], b.shape[2]) for path, (a, b) in frozen.items()}
    start = as_factors(new_lora("", shapes, rank, task.training.seed))
    projections = task.fit(start, partial(fold, frozen), rows)
    return as_adapter(merge.name, fold(frozen, projections))


def fold(merge: Factors, projections: Factors) -> Factors:
    """The factors of the merge and of the projection of its type, side by side.

    Args:
        merge: module path -> a `(1, in, r)`, b `(1, r, out)`.
        projections: type of module -> P1 `(1, in, s)`, P2 `(1, s, out)`.

    Returns:
        Module path -> a `(1, in, r + s)`, b `(1, r + s, out)`; no number is changed.
    """
    folded = {}
    for path, (a, b) in merge.items():
        p1, p2 = projections[_kind(path, a, b)]
        folded[path] = mx.concatenate([a, p1], axis=2), mx.concatenate([b, p2], axis=1)
    return folded


def _kind(path: str, a: mx.array, b: mx.array) -> str:
    """The type of a module: its path within a block, and its shape, which may differ by layer."""
    inner = path.split(".layers.")[1].partition(".")[2]
    return f"{inner} {a.shape[1]} {b.shape[2]}"


def block_weights(logits: mx.array) -> mx.array:
    """Weights of the skills in every block of features: sigmoids, divided by their sum.

    Args:
        logits: `(q, s)`, q blocks and s skills.

    Returns:
        `(q, s)` with the sum 1 in every block.
    """
    gates = mx.sigmoid(logits)
    return gates / (gates.sum(axis=-1, keepdims=True) + _EPS)


def weighted_blocks(skills: KeysValues, weights: mx.array) -> KeysValues:
    """`a (in, s, r)` and `b (s, r, out)` times the weights `(q, s)` of their blocks of features."""
    a, b = skills
    left, right = (mx.repeat(weights, n // len(weights), axis=0) for n in (a.shape[1], b.shape[2]))
    return a.transpose(1, 0, 2) * left[..., None], b * right.T[:, None]


def route(skills: KeysValues, weights: mx.array) -> KeysValues:
    """The sum of the skills' updates, each block of dW times the root of its two weights.

    A block of dW belongs to a block of input features and to one of output features. With the same
    weights w in all blocks the result is the sum of `w_s dW_s`.

    Args:
        skills: a `(s, in, r)`, b `(s, r, out)`.
        weights: `(q, s)`; q divides in and out.

    Returns:
        a `(in, s r)`, b `(s r, out)`.
    """
    a, b = weighted_blocks(skills, mx.sqrt(weights))
    return a.reshape(a.shape[0], -1), b.reshape(-1, b.shape[-1])


def train_routing(
    task: NewTask,
    skills: Sequence[Adapter],
    rows: ExampleSet,
    how: Route = route,
    rate: float | None = _ROUTING_RATE,
) -> Adapter:
    """Train the weights on some rows, the skills stay as they are (MHR-z).

    Args:
        task: trains them.
        skills: adapters; a module that one has not is zero there.
        rows: prompts with answers.
        how: makes one module of the skills and their weights.
        rate: highest learning rate; None is that of the task.

    Returns:
        One LoRA; by `route` its rank is the sum of the skills' ranks.
    """
    rng = np.random.default_rng(task.training.seed)
    stacked, start = {}, {}
    for path in sorted({path for adapter in skills for path in adapter.modules}):
        a, b = task.base.stacked_factors(path, skills)
        stacked[path] = a.astype(mx.float32), b.astype(mx.float32)
        n_blocks = math.gcd(a.shape[1], b.shape[2], _N_BLOCKS)
        drawn = rng.uniform(-_START, _START, (n_blocks, len(skills)))
        start[path] = mx.array(drawn, mx.float32)

    def make(logits: dict[str, mx.array]) -> Factors:
        routed = {path: how(stacked[path], block_weights(logits[path])) for path in stacked}
        return {path: (a[None], b[None]) for path, (a, b) in routed.items()}

    return as_adapter(skills[0].name, make(task.fit(start, make, rows, rate=rate)))


def train_adamix(
    task: NewTask, start: Adapter, rows: ExampleSet, copies: int = 8, consistency: float = 1.0
) -> Adapter:
    """Train copies of an adapter on the answers of some rows, and average them.

    Args:
        task: trains them.
        start: what all copies are at the beginning, such as a `new_lora`.
        rows: prompts with answers.
        copies: number of copies of every A; 8 as published for generation.
        consistency: weight of the symmetric KL divergence of the two draws, in nats per target.

    Returns:
        The mean, of the rank of `start`.

    Raises:
        ModelError: the architecture scales or caps its logits.
    """
    rng = np.random.default_rng([task.training.seed, copies])

    def gradient(
        model: Distiller, parameters: Parameters, step: Sequence[TeacherRow]
    ) -> Parameters:
        draws = rng.integers(copies, size=(2, len(parameters)))
        return adamix_gradient(model, parameters, draws, step, consistency)

    many = {path: (mx.repeat(a, copies, axis=0), b) for path, (a, b) in as_factors(start).items()}
    trained = task.fit(many, _mean, rows, gradient)
    return replace(start, modules=as_adapter("", _mean(trained)).modules)


def _mean(parameters: Factors) -> Factors:
    return {path: (a.mean(axis=0, keepdims=True), b) for path, (a, b) in parameters.items()}


def adamix_gradient(
    model: Distiller,
    parameters: Factors,
    draws: np.ndarray,
    step: Sequence[TeacherRow],
    consistency: float,
) -> Factors:
    """The gradient of AdaMix' loss, in nats per target, for two draws p and q.

    The loss is `(NLL(p) + NLL(q)) / 2 + consistency * (KL(p||q) + KL(q||p)) / 2`; the first
    distribution of each KL is not differentiated.

    Args:
        model: with an adapter of these modules attached.
        parameters: module path -> a `(copies, in, r)`, b `(1, r, out)`.
        draws: `(2, n_modules)`, the copy that each draw has of every module.
        step: rows with their answers.
        consistency: see above.
    """

    def drawn(parameters: Factors, draw: np.ndarray) -> Factors:
        """One copy of every module."""
        return {path: (a[int(i)][None], b) for i, (path, (a, b)) in zip(draw, parameters.items())}

    students = [drawn(parameters, draw) for draw in draws]
    answered = ExampleSet("", tuple(row.example for row in step))
    teachers = [model.teacher_rows(as_adapter("", student), answered) for student in students]
    share = 0.5 / sum(row.example.n_targets for row in step)
    weights = [(share, consistency * share)] * len(step)
    total = tree_map(mx.zeros_like, parameters)
    for draw, student, teacher in zip(draws, students, reversed(teachers)):
        by_factor = model.gradient(student, teacher, weights)
        total = tree_map(mx.add, total, pull_back(partial(drawn, draw=draw), parameters, by_factor))
    return total
