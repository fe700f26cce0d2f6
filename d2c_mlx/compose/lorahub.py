"""LoraHub: weights of a mix found without gradients, on the rows of the new task.

Source: https://arxiv.org/abs/2307.13269, and its code, github.com/sail-sg/lorahub. There nevergrad
searches and factors are mixed; here a small evolution strategy does, by default on dW.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["N_MODULES", "lorahub_objective", "search_weights"]

# Published settings: bounds of a weight, weight of the regularisation, evaluations, and the most
# adapters, which are drawn at random.
_BOUND, _L1, _EVALUATIONS, N_MODULES = 1.5, 0.05, 40, 20
# Step width at the start, its change after a step that helps and after one that does not, and the
# chance of every weight to be changed in a step.
_STEP, _WIDER, _NARROWER, _CHANGED = 0.5, 1.5, 0.9, 0.25


def lorahub_objective(loss: float, weights: np.ndarray) -> float:
    """What LoraHub minimises: `loss + 0.05 * mean |w_i|`, as its code has it."""
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
    """
    rng = np.random.default_rng(seed)
    best, width = np.zeros(n), _STEP
    lowest = lorahub_objective(loss(best), best)
    for _ in range(evaluations - 1):
        changed = rng.random(n) < max(_CHANGED, 1 / n)
        changed[rng.integers(n)] = True
        step = rng.normal(0, width, n) * changed
        tried = np.clip(best + step, -_BOUND, _BOUND)
        found = lorahub_objective(loss(tried), tried)
        if found < lowest:
            best, lowest, width = tried, found, width * _WIDER
        else:
            width *= _NARROWER
    return best
