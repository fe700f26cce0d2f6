"""The ways to make one adapter for a new task, from the simplest to the most complex.

A method is a pure function of a `NewTask`, of some of its rows, and of one number that the rows
decide by cross-validation: a scale of dW, or the index of an adapter. It mixes updates (dW); where
a paper mixes A and B apart, the method's name ends in `-factors` and serves comparisons only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.adamix import train_adamix
from d2c_mlx.compose.calibration import calibrate
from d2c_mlx.compose.lorahub import N_MODULES, search_weights
from d2c_mlx.compose.mixing import (
    continual_weights,
    mix,
    mix_factors,
    random_like,
    similarity_weights,
)
from d2c_mlx.compose.new_task import NewTask
from d2c_mlx.compose.routing import Route, route, route_factors, train_routing
from d2c_mlx.compose.train import new_lora
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import AdapterError

__all__ = ["AUTO", "METHODS", "Make", "Method"]

# (task, rows to learn from, choice) -> the adapter.
Make = Callable[[NewTask, ExampleSet, float], Adapter]

# Scales of dW that the rows choose from. What ten rows teach is worth less than all of it.
_SCALES = (0.35, 0.5, 0.7, 1.0)
# Adapters of the library that are mixed where the rows choose them.
_N_TOP = 3
# Skills of multi-head routing, and the learning rate of their weights, as published.
_N_SKILLS, _ROUTING_RATE = 8, 0.1


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        make: makes the adapter.
        choices: the numbers that cross-validation chooses from; None is the index of every adapter
            of the library.
        about: a few words, for people.
        needs_prompts: whether it reads `NewTask.similarity`.
        trainings: about how many trainings of a fresh LoRA its own take, for progress.
    """

    make: Make
    choices: Sequence[float] | None = (1.0,)
    about: str = ""
    needs_prompts: bool = False
    trainings: int = 0


def _best(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return task.library[int(choice)]


def _uniform(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return task.mixed(task.library, np.full(len(task.library), 1 / len(task.library)))


def _retrieve(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    assert task.similarity is not None, "checked before"
    return task.mixed(task.library, similarity_weights(task.similarity))


def _by_loss(task: NewTask, rows: ExampleSet) -> list[Adapter]:
    """The adapters of the library, the one that suits the rows best first."""
    order = np.argsort(task.losses(task.library, rows), kind="stable")
    return [task.library[i] for i in order]


def _top(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    some = _by_loss(task, rows)[:_N_TOP]
    return scaled(task.mixed(some, np.full(len(some), 1 / len(some))), choice)


def _continual(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    # The last weighs most.
    worst_first = _by_loss(task, rows)[::-1]
    return task.mixed(worst_first, continual_weights(len(worst_first)))


def _fresh(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.fresh(rows), choice)


def _best_trained(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(_by_loss(task, rows)[0], rows), choice)


def _mean_trained(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(_uniform(task, rows, 1.0), rows), choice)


def _routed(how: Route, task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    skills = _by_loss(task, rows)[:_N_SKILLS]
    found = task.made(how.__name__, skills, rows,
                      lambda trainer: train_routing(trainer, skills, rows, how),
                      _ROUTING_RATE)  # fmt: skip
    return scaled(task.mixed([found], np.ones(1)), choice)


def _calibrated(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    pair = _by_loss(task, rows)[:2]
    merge = mix(pair, [choice] * len(pair), task.rank)
    return task.made("calibrate", [merge], rows, lambda trainer: calibrate(trainer, merge, rows))


def _adamix(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    start = new_lora(task.name, task.shapes, task.rank, task.training.seed)
    found = task.made("adamix", [start], rows, lambda trainer: train_adamix(trainer, start, rows))
    return scaled(found, choice)


def _shift(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    shapes = {path: shape for path, shape in task.base.module_shapes.items()
              if path.endswith(".down_proj")}  # fmt: skip
    if not shapes:
        raise AdapterError(
            f"method: shift trains down_proj, which {task.base.name} has not; use fresh"
        )
    start = new_lora(task.name, shapes, 1, task.training.seed)
    return scaled(task.trained(start, rows), choice)


def _fresh_and(
    change: Callable[[Adapter], Adapter], task: NewTask, rows: ExampleSet, choice: float
) -> Adapter:
    """A fresh LoRA and the mean of the adapters that suit best, each changed, times one scale."""
    some = [change(one) for one in _by_loss(task, rows)[:_N_TOP]]
    shares = np.array([1.0, *[1 / len(some)] * len(some)])
    return scaled(task.mixed([task.fresh(rows), *some], shares), choice)


def _lorahub(
    blend: Callable[[Sequence[Adapter], np.ndarray], Adapter] | None,
    task: NewTask,
    rows: ExampleSet,
    choice: float,
) -> Adapter:
    """LoraHub by `blend`; None is `mix` on dW."""
    seed = task.training.seed
    drawn = np.random.default_rng(seed).permutation(len(task.library))[:N_MODULES]
    some = [task.library[i] for i in sorted(drawn)]
    made = blend or (lambda adapters, weights: mix(adapters, weights, task.rank))
    weights = search_weights(
        lambda tried: float(task.losses([made(some, tried)], rows)[0]), len(some), seed
    )
    return made(some, weights)


# The simplest first: of methods that are as good, the first is taken.
METHODS: dict[str, Method] = {
    "best": Method(_best, None, "the adapter of the library that suits the rows best"),
    "uniform": Method(_uniform, about="the mean of all adapters"),
    "retrieve": Method(_retrieve, about="adapters of the tasks with the nearest prompts",
                       needs_prompts=True),
    "top": Method(_top, (*_SCALES, 1.4), "the mean of the three best adapters, times one scale"),
    "continual": Method(_continual, about="all adapters, merged one by one, the best last"),
    "fresh": Method(_fresh, about="a LoRA trained on the rows", trainings=1),
    "fresh-scaled": Method(_fresh, _SCALES, "a LoRA trained on the rows, times one scale"),
    "fresh-library": Method(partial(_fresh_and, lambda one: one), _SCALES,
                            "that LoRA and the three best adapters, times one scale"),
    "best-trained": Method(_best_trained, _SCALES,
                           "the best adapter, trained on with the rows, times one scale",
                           trainings=1),
    "shift": Method(_shift, _SCALES, "a LoRA of rank 1 on every down_proj (AdapterBias): the least"
                    " to train", trainings=1),
    "mean-trained": Method(_mean_trained, _SCALES,
                           "the mean of all adapters, trained on with the rows (MHR-mu)",
                           trainings=1),
    "routed": Method(partial(_routed, route), _SCALES,
                     "weights per module and block of features, trained on the rows (MHR-z)",
                     trainings=1),
    "calibrated": Method(_calibrated, (0.5, 1.0), "the two best adapters, and a projection beside"
                         " them trained on the rows", trainings=2),
    "adamix": Method(_adamix, _SCALES, "copies of a LoRA trained with random routing, averaged",
                     trainings=3),
    "lorahub": Method(partial(_lorahub, None), about="weights searched without gradients",
                      trainings=3),
    "fresh-random": Method(partial(_fresh_and, random_like), _SCALES,
                           "a control: fresh-library with adapters of random values"),
    "lorahub-factors": Method(partial(_lorahub, mix_factors),
                              about="lorahub as published, on A and B apart, to compare",
                              trainings=3),
    "routed-factors": Method(partial(_routed, route_factors), _SCALES,
                             "routed as published, on A and B apart, to compare", trainings=1),
}  # fmt: skip
# What `auto` chooses from: at most eight, and none that searches for long.
AUTO = ("best", "uniform", "retrieve", "top", "fresh", "fresh-scaled", "fresh-library",
        "best-trained")  # fmt: skip
