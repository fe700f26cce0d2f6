"""The ways to make one adapter for a new task, from the simplest to the most complex.

A method is a pure function of a `NewTask`, of some of its rows, and of one number that the rows
decide by cross-validation: a scale of dW, or the index of an adapter. It mixes updates (dW); where
a paper mixes A and B apart, the method's name ends in `-factors` and serves comparisons only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.new_task import NewTask
from d2c_mlx.merge.methods import merge_adapters
from d2c_mlx.models.examples import ExampleSet

__all__ = ["METHODS", "Method"]

# (task, rows to learn from, choice) -> the adapter.
Make = Callable[[NewTask, ExampleSet, float], Adapter]


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        make: makes the adapter.
        choices: the numbers that cross-validation chooses from; None is the index of every adapter
            of the library.
        about: a few words, for people.
    """

    make: Make
    choices: Sequence[float] | None = (1.0,)
    about: str = ""


def _best(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return task.library[int(choice)]


def _uniform(task: NewTask, rows: ExampleSet, choice: float) -> Adapter:
    return merge_adapters(task.library)


# The simplest first: of methods that are as good, the first is taken.
METHODS: dict[str, Method] = {
    "best": Method(_best, None, "the adapter of the library that suits the rows best"),
    "uniform": Method(_uniform, about="the mean of all adapters"),
}
