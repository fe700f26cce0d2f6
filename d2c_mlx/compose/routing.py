"""Multi-head routing: adapters are skills, mixed by weights per module and block of features.

`route` mixes the updates. `route_factors` mixes A and B apart, as the paper and PEFT's Poly layer
do: cross terms A_i B_j appear, and a uniform mix of n keeps 1 / n^2 of each update. It serves
comparisons only.

Source: https://arxiv.org/abs/2211.03831 (MHR), https://arxiv.org/abs/2202.13914 (Polytropon).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.train import Trainer, as_adapter
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.forward import KeysValues

__all__ = ["block_weights", "route", "route_factors", "train_routing"]

# As in PEFT, so that weights of which all are nearly zero do not divide by it.
_EPS = 1e-12
# Logits at the start are uniform within this.
_START = 1e-3
# Most blocks that the features of a module are cut into.
_N_BLOCKS = 8

# a `(s, in, r)` and b `(s, r, out)` of s skills, and weights `(q, s)` -> a `(in, R)`, b `(R, out)`.
Route = Callable[[KeysValues, mx.array], KeysValues]


def block_weights(logits: mx.array) -> mx.array:
    """Weights of the skills in every block of features: sigmoids, divided by their sum.

    Args:
        logits: `(q, s)`, q blocks and s skills.

    Returns:
        `(q, s)` with the sum 1 in every block.
    """
    gates = mx.sigmoid(logits)
    return gates / (gates.sum(axis=-1, keepdims=True) + _EPS)


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
    a, b = _by_blocks(skills, mx.sqrt(weights))
    return a.reshape(a.shape[0], -1), b.reshape(-1, b.shape[-1])


def route_factors(skills: KeysValues, weights: mx.array) -> KeysValues:
    """The published form: blocks of A and of B summed apart; only to compare, see the module.

    Args:
        skills: a `(s, in, r)`, b `(s, r, out)`.
        weights: `(q, s)`; q divides in and out.

    Returns:
        a `(in, r)`, b `(r, out)`.
    """
    a, b = _by_blocks(skills, weights)
    return a.sum(axis=1), b.sum(axis=0)


def _by_blocks(skills: KeysValues, weights: mx.array) -> KeysValues:
    """`a (in, s, r)` and `b (s, r, out)` times the weights of their blocks of features."""
    a, b = skills
    left, right = (mx.repeat(weights, n // len(weights), axis=0) for n in (a.shape[1], b.shape[2]))
    return a.transpose(1, 0, 2) * left[..., None], b * right.T[:, None]


def train_routing(
    trainer: Trainer, skills: Sequence[Adapter], rows: ExampleSet, how: Route = route
) -> Adapter:
    """Train the weights on some rows, the skills stay as they are (MHR-z).

    Args:
        trainer: trains them; its learning rate should be about 0.1.
        skills: adapters; a module that one has not is zero there.
        rows: prompts with answers.
        how: `route` or `route_factors`.

    Returns:
        One LoRA; by `route` its rank is the sum of the skills' ranks.
    """
    paths = sorted({path for one in skills for path in one.modules})
    stacked: dict[str, KeysValues] = {}
    for path in paths:
        a, b = trainer.base.stacked_factors(path, skills)
        stacked[path] = a.astype(mx.float32), b.astype(mx.float32)
    rng = np.random.default_rng(trainer.options.seed)
    logits = {}
    for path, (a, b) in stacked.items():
        n_blocks = math.gcd(a.shape[1], b.shape[2], _N_BLOCKS)
        logits[path] = mx.array(rng.uniform(-_START, _START, (n_blocks, len(skills))), mx.float32)

    def make(logits: dict[str, mx.array]) -> dict[str, KeysValues]:
        found = {path: how(stacked[path], block_weights(logits[path])) for path in paths}
        return {path: (a[None], b[None]) for path, (a, b) in found.items()}

    return as_adapter(skills[0].name, make(trainer.fit(logits, make, rows)))
