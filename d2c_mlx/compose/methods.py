"""The ways to make one adapter for a new task, from the simplest to the most complex.

A method is a pure function of a `NewTask`, of some of its rows, and of one number that the rows
decide by cross-validation: a scale of dW, or the index of an adapter. It mixes updates (dW), also
where a paper mixes A and B apart. docs/how-to/new-task.md says in a row what each makes. Other
packages add theirs by entry points (plugins.py), as examples/plugin does those of more papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.new_task import NewTask
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.plugins import COMPOSE_METHODS, find

__all__ = ["METHODS", "SCALES", "Method", "find_method", "similarity_weights"]

# Scales of dW that the rows choose from. What ten rows teach is worth less than all of it.
SCALES = (0.35, 0.5, 0.7, 1.0)
# Adapters of the library that are mixed where the rows choose them.
_N_TOP = 3


@dataclass(frozen=True)
class Method:
    """A way to make an adapter, and what has to be known of it before it is called.

    Attributes:
        make: function of the task, rows to learn from, and a choice; it returns the adapter.
        choices: the numbers that cross-validation chooses from; None is the index of every adapter
            of the library.
        needs_prompts: it reads `NewTask.similarity`.
        trains: it follows a gradient, so the base model needs a head that is linear.
    """

    make: Callable[[NewTask, ExampleSet, float], Adapter]
    choices: Sequence[float] | None = (1.0,)
    needs_prompts: bool = False
    trains: bool = False

    def __call__(self, task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
        """Make the adapter."""
        return self.make(task, rows, choice)


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
    return scaled(task.mixed(task.by_loss(rows)[:_N_TOP]), choice)


def _retrieve(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    assert task.similarity is not None, "checked before"
    return task.mixed(task.library, similarity_weights(task.similarity))


def _fresh(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(task.start, rows), choice)


def _fresh_library(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    top = task.by_loss(rows)[:_N_TOP]
    shares = np.array([1.0, *[1 / len(top)] * len(top)])
    return scaled(task.mixed([task.trained(task.start, rows), *top], shares), choice)


def _best_trained(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return scaled(task.trained(task.by_loss(rows)[0], rows), choice)


# Methods that `auto` compares, the simplest first: of equally good ones the first is taken.
METHODS: dict[str, Method] = {
    "best": Method(lambda task, rows, choice: task.library[int(choice)], None),
    "uniform": Method(lambda task, rows, choice: task.mixed(task.library)),
    "retrieve": Method(_retrieve, needs_prompts=True),
    "top": Method(_top, (*SCALES, 1.4)),
    "fresh": Method(_fresh, trains=True),
    "fresh-scaled": Method(_fresh, SCALES, trains=True),
    "fresh-library": Method(_fresh_library, SCALES, trains=True),
    "best-trained": Method(_best_trained, SCALES, trains=True),
}


def find_method(name: str) -> Method:
    """The method of a name: a key of `METHODS`, or a plug-in's, whose results are checked.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    plugin = find(COMPOSE_METHODS, name, ("auto", *METHODS))
    loaded = plugin.load()

    def make(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
        adapter, shapes = plugin.call(task, rows, choice), task.base.module_shapes
        if not isinstance(adapter, Adapter) or not all(
            lora.shape == shapes.get(path) and all(np.isfinite(x).all() for x in lora.factors())
            for path, lora in adapter.modules.items()
        ):
            raise plugin.wrong(adapter, f"an Adapter of finite numbers for {task.base.name}")
        return adapter

    return replace(loaded if isinstance(loaded, Method) else Method(loaded), make=make)
