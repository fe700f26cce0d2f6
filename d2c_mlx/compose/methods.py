"""The ways to make one adapter for a new task, from the simplest to the most complex.

A method is a pure function of a `NewTask`, of some of its rows, and of one number that the rows
decide by cross-validation: a scale of dW, or the index of an adapter. It mixes updates (dW), also
where a paper mixes A and B apart; benchmarks/new_task has such published forms, to compare.
docs/how-to/new-task.md says in a row what each makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.new_task import NewTask, mix
from d2c_mlx.compose.train import new_lora
from d2c_mlx.compose.trained import calibrate, train_adamix, train_routing
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import AdapterError

__all__ = [
    "AUTO", "METHODS", "SCALES", "Make", "Method", "by_loss", "continual_weights",
    "lorahub_objective", "search_weights", "similarity_weights",
]  # fmt: skip

# (task, rows to learn from, choice) -> the adapter.
Make = Callable[[NewTask, ExampleSet, float], Adapter]

# Scales of dW that the rows choose from. What ten rows teach is worth less than all of it.
SCALES = (0.35, 0.5, 0.7, 1.0)
# Adapters of the library that are mixed where the rows choose them.
_N_TOP = 3
# Skills of multi-head routing, and the learning rate of their weights, as published.
_N_SKILLS, _ROUTING_RATE = 8, 0.1
# LoraHub as published: bounds of a weight, weight of the regularisation, evaluations, and the most
# adapters, which are drawn at random.
_BOUND, _L1, _EVALUATIONS, _N_MODULES = 1.5, 0.05, 40, 20
# The search for its weights: step width at the start, its change after a step that helps and after
# one that does not, and the chance of every weight to be changed in a step.
_STEP, _WIDER, _NARROWER, _CHANGED = 0.5, 1.5, 0.9, 0.25


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        make: makes the adapter.
        choices: the numbers that cross-validation chooses from; None is the index of every adapter
            of the library.
        needs_prompts: it reads `NewTask.similarity`.
        trains: it follows a gradient, so the base model needs a head that is linear.
    """

    make: Make
    choices: Sequence[float] | None = (1.0,)
    needs_prompts: bool = False
    trains: bool = False


def by_loss(task: NewTask, rows: ExampleSet) -> list[Adapter]:
    """The adapters of the library, the one that suits the rows best first."""
    order = np.argsort(task.losses(task.library, rows), kind="stable")
    return [task.library[i] for i in order]


def _best(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return task.library[int(choice)]


def _uniform(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return task.mixed(task.library, np.full(len(task.library), 1 / len(task.library)))


def _retrieve(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    assert task.similarity is not None, "checked before"
    return task.mixed(task.library, similarity_weights(task.similarity))


def similarity_weights(
    similarity: np.ndarray, n_nearest: int = 3, temperature: float = 0.2
) -> np.ndarray:
    """Weights of the nearest tasks' adapters, a softmax of their similarities; others have 0.

    Args:
        similarity: `(n,)` cosines of the new task with the tasks of each adapter.
        n_nearest: number of adapters with a weight above 0.
        temperature: similarities are divided by it.

    Returns:
        `(n,)`, with the sum 1.

    Source: LORAUTER, https://arxiv.org/abs/2601.21795.
    """
    nearest = np.argsort(-similarity, kind="stable")[:n_nearest]
    weights = np.zeros(len(similarity))
    weights[nearest] = np.exp((similarity[nearest] - similarity.max()) / temperature)
    return weights / weights.sum()


def _top(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    top = by_loss(task, rows)[:_N_TOP]
    return scaled(task.mixed(top, np.full(len(top), 1 / len(top))), choice)


def _continual(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    # The last weighs most.
    worst_first = by_loss(task, rows)[::-1]
    return task.mixed(worst_first, continual_weights(len(worst_first)))


def continual_weights(n: int) -> np.ndarray:
    """Weights `(n,)` of adapters that are merged one by one, `m <- (m + dW_t) / 2`.

    The last has 1/2, the first two 1 / 2^(n-1) each: the order decides.

    Source: MergeRepair, https://arxiv.org/abs/2408.09568, which merges factors.
    """
    weights = 0.5 ** np.arange(n, 0, -1)
    weights[0] *= 2
    return weights


def _fresh(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(task.start, rows), choice)


def _fresh_library(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    top = by_loss(task, rows)[:_N_TOP]
    shares = np.array([1.0, *[1 / len(top)] * len(top)])
    return scaled(task.mixed([task.trained(task.start, rows), *top], shares), choice)


def _best_trained(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(by_loss(task, rows)[0], rows), choice)


def _shift(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    modules = task.base.module_shapes.items()
    shapes = {path: shape for path, shape in modules if path.endswith(".down_proj")}
    if not shapes:
        raise AdapterError(
            f"method: shift trains down_proj, which {task.base.name} has not; use fresh"
        )
    start = new_lora(task.name, shapes, 1, task.training.seed)
    return scaled(task.trained(start, rows), choice)


def _mean_trained(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(_uniform(task, rows, 1.0), rows), choice)


def _routed(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    skills = by_loss(task, rows)[:_N_SKILLS]
    routed = task.fit(
        "route", skills, rows, lambda trainer: train_routing(trainer, skills, rows), _ROUTING_RATE
    )
    return scaled(task.mixed([routed], np.ones(1)), choice)


def _calibrated(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    pair = by_loss(task, rows)[:2]
    merge = mix(pair, [choice] * len(pair), task.rank)
    return task.fit("calibrate", [merge], rows, lambda trainer: calibrate(trainer, merge, rows))


def _adamix(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    start = task.start
    mean = task.fit("adamix", [start], rows, lambda trainer: train_adamix(trainer, start, rows))
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


# The simplest first: of methods that are as good, the first is taken.
METHODS: dict[str, Method] = {
    "best": Method(_best, None),
    "uniform": Method(_uniform),
    "retrieve": Method(_retrieve, needs_prompts=True),
    "top": Method(_top, (*SCALES, 1.4)),
    "continual": Method(_continual),
    "fresh": Method(_fresh, trains=True),
    "fresh-scaled": Method(_fresh, SCALES, trains=True),
    "fresh-library": Method(_fresh_library, SCALES, trains=True),
    "best-trained": Method(_best_trained, SCALES, trains=True),
    "shift": Method(_shift, SCALES, trains=True),
    "mean-trained": Method(_mean_trained, SCALES, trains=True),
    "routed": Method(_routed, SCALES, trains=True),
    "calibrated": Method(_calibrated, (0.5, 1.0), trains=True),
    "adamix": Method(_adamix, SCALES, trains=True),
    "lorahub": Method(_lorahub),
}
# What `auto` chooses from: at most eight, and none that searches for long.
_TRAINED = ("fresh", "fresh-scaled", "fresh-library", "best-trained")
AUTO = ("best", "uniform", "retrieve", "top", *_TRAINED)
