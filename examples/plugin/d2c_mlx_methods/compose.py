"""Ways to make one adapter for a new task that `auto` does not try; trained.py has their training.

Each is a function of the task, of rows to learn from, and of a number that cross-validation
chooses: a scale of dW.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.methods import SCALES, Method, NewTask, mix, new_lora
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx_methods.trained import calibrate, train_adamix, train_routing

__all__ = [
    "ADAMIX",
    "CALIBRATED",
    "CONTINUAL",
    "LORAHUB",
    "MEAN_TRAINED",
    "ROUTED",
    "SHIFT",
    "continual_weights",
    "lorahub_objective",
    "search_weights",
]

# Skills of multi-head routing, as published.
_N_SKILLS = 8
# LoraHub as published: bounds of a weight, weight of the regularisation, evaluations, and the most
# adapters, which are drawn at random.
_BOUND, _L1, _EVALUATIONS, _N_MODULES = 1.5, 0.05, 40, 20
# The search for its weights: step width at the start, its change after a step that helps and after
# one that does not, and the chance of every weight to be changed in a step.
_STEP, _WIDER, _NARROWER, _CHANGED = 0.5, 1.5, 0.9, 0.25


def _continual(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    # The last weighs most.
    worst_first = task.by_loss(rows)[::-1]
    return task.mixed(worst_first, continual_weights(len(worst_first)))


def continual_weights(n: int) -> np.ndarray:
    """Weights `(n,)` of adapters that are merged one by one, `m <- (m + dW_t) / 2`.

    The last has 1/2, the first two 1 / 2^(n-1) each: the order decides.

    Source: MergeRepair, https://arxiv.org/abs/2408.09568, which merges factors.
    """
    weights = 0.5 ** np.arange(n, 0, -1)
    weights[0] *= 2
    return weights


def _shift(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    modules = task.base.module_shapes.items()
    shapes = {path: shape for path, shape in modules if path.endswith(".down_proj")}
    if not shapes:
        raise ConfigError(f"{task.base.name} has no down_proj, which shift trains; use fresh")
    start = new_lora(task.name, shapes, 1, task.training.seed)
    return scaled(task.trained(start, rows), choice)


def _mean_trained(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(task.mixed(task.library), rows), choice)


def _routed(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    skills = task.by_loss(rows)[:_N_SKILLS]
    key = ("route", rows.tokens_digest, *(skill.digest for skill in skills))
    routed = task.once(key, lambda: train_routing(task, skills, rows))
    return scaled(task.mixed([routed], np.ones(1)), choice)


def _calibrated(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    pair = task.by_loss(rows)[:2]
    merge = mix(pair, [choice] * len(pair), task.rank)
    key = ("calibrate", rows.tokens_digest, merge.digest)
    return task.once(key, lambda: calibrate(task, merge, rows))


def _adamix(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    start = task.start
    key = ("adamix", rows.tokens_digest, start.digest)
    mean = task.once(key, lambda: train_adamix(task, start, rows))
    return scaled(mean, choice)


def _lorahub(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    seed = task.training.seed
    drawn = np.random.default_rng(seed).permutation(len(task.library))[:_N_MODULES]
    adapters = [task.library[i] for i in sorted(drawn)]

    def loss(weights: np.ndarray) -> float:
        return float(task.losses([mix(adapters, weights, task.rank)], rows)[0])

    return mix(adapters, search_weights(loss, len(adapters), seed), task.rank)


def lorahub_objective(loss: float, weights: np.ndarray) -> float:
    """LoraHub's objective: `loss + 0.05 * mean |w_i|`, as its code has it."""
    return loss + _L1 * float(np.abs(weights).mean())


def search_weights(
    loss: Callable[[np.ndarray], float], n: int, seed: int = 0, evaluations: int = _EVALUATIONS
) -> np.ndarray:
    """Weights with a small `lorahub_objective`, by a (1+1) evolution strategy from 0.

    Args:
        loss: gives the loss of a mix, in nats, for weights `(n,)`.
        n: number of adapters.
        seed: seed of the steps.
        evaluations: how often `loss` is asked.

    Returns:
        `(n,)` weights within -1.5 and 1.5; all 0 if no mix is better than the base model.

    Source: https://arxiv.org/abs/2307.13269, and its code, github.com/sail-sg/lorahub. There
    nevergrad searches and factors are mixed.
    """
    rng = np.random.default_rng(seed)
    best, width = np.zeros(n), _STEP
    lowest = lorahub_objective(loss(best), best)
    for _ in range(evaluations - 1):
        changed = rng.random(n) < max(_CHANGED, 1 / n)
        changed[rng.integers(n)] = True
        step = rng.normal(0, width, n) * changed
        weights = np.clip(best + step, -_BOUND, _BOUND)
        objective = lorahub_objective(loss(weights), weights)
        if objective < lowest:
            best, lowest, width = weights, objective, width * _WIDER
        else:
            width *= _NARROWER
    return best


CONTINUAL = Method(_continual)
SHIFT = Method(_shift, SCALES, trains=True)
MEAN_TRAINED = Method(_mean_trained, SCALES, trains=True)
ROUTED = Method(_routed, SCALES, trains=True)
CALIBRATED = Method(_calibrated, (0.5, 1.0), trains=True)
ADAMIX = Method(_adamix, SCALES, trains=True)
LORAHUB = Method(_lorahub)
