"""Cross-validation on the rows of a new task: what each method would be worth on rows to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from d2c_mlx.compose.methods import Method
from d2c_mlx.compose.new_task import NewTask
from d2c_mlx.models.examples import ExampleSet

__all__ = ["Score", "as_good", "choose", "cross_validate", "difference", "join", "split"]

_N_FOLDS = 5
# Nats per target token that are no difference, however small the standard error is.
_EQUAL = 1e-3


@dataclass(frozen=True)
class Score:
    """A method on rows that it did not see.

    Attributes:
        losses: `(n_folds,)` mean NLL per target token of each fold, in nats.
        n_targets: `(n_folds,)` target tokens of each fold.
        choice: the number that all folds together choose, see `Method`; None is the base model.
    """

    losses: np.ndarray
    n_targets: np.ndarray
    choice: float | None = None

    @property
    def loss(self) -> float:
        """Mean NLL per target token over all rows, in nats."""
        return float(np.average(self.losses, weights=self.n_targets))


def split(rows: ExampleSet, seed: int = 0) -> list[ExampleSet]:
    """Cut rows into five folds in a random order, or into as many as there are rows.

    Args:
        rows: at least two.
        seed: seed of the order.
    """
    n = len(rows.examples)
    order = np.random.default_rng(seed).permutation(n)
    return [
        replace(rows, examples=tuple(rows.examples[i] for i in sorted(fold)), cuts=())
        for fold in np.array_split(order, min(_N_FOLDS, n))
    ]


def join(folds: Sequence[ExampleSet]) -> ExampleSet:
    """Folds as one set with them as its parts, so that a loss on a fold is evaluated once."""
    ends = accumulate(len(fold.examples) for fold in folds[:-1])
    examples = tuple(example for fold in folds for example in fold.examples)
    return replace(folds[0], examples=examples, cuts=tuple(ends))


def cross_validate(
    task: NewTask, methods: Mapping[str, Method], folds: Sequence[ExampleSet]
) -> dict[str, Score]:
    """Score the base model and every method, each fold by what is made of the others.

    A method's choice for a fold is that of the lowest loss on the other folds, so no fold chooses
    for itself.

    Args:
        task: the new task.
        methods: name -> method.
        folds: two or more parts of the task's rows.

    Returns:
        "base", and every name, in the order given -> its score.
    """
    n_targets = np.array([fold.n_targets for fold in folds])
    ((base),) = task.scorer.losses([(None, folds)])
    scores = {"base": Score(base, n_targets)}
    for name, method in methods.items():
        choices = range(len(task.library)) if method.choices is None else method.choices
        jobs = []
        for k, fold in enumerate(folds):
            rest = join([*folds[:k], *folds[k + 1 :]])
            jobs += [(method(task, rest, choice), [fold]) for choice in choices]
        losses = np.concatenate(task.scorer.losses(jobs)).reshape(len(folds), -1)
        sums = losses * n_targets[:, None]
        others = sums.sum(axis=0) - sums
        honest = losses[np.arange(len(folds)), others.argmin(axis=1)]
        scores[name] = Score(honest, n_targets, float(choices[int(sums.sum(axis=0).argmin())]))
    return scores


def difference(score: Score, other: Score) -> tuple[float, float]:
    """The loss minus that of the other, and its standard error over folds, in nats."""
    each = score.losses - other.losses
    weights = score.n_targets / score.n_targets.sum()
    mean = float(each @ weights)
    spread = np.sqrt((weights**2 * (each - mean) ** 2).sum() * len(each) / (len(each) - 1))
    return mean, float(spread)


def as_good(score: Score, other: Score) -> bool:
    """True if the loss is above that of the other by no more than a standard error."""
    mean, error = difference(score, other)
    return mean <= max(error, _EQUAL)


def choose(scores: Mapping[str, Score]) -> str:
    """The first method that is `as_good` as the one with the lowest loss.

    Args:
        scores: name -> score, the simplest first; "base" takes no part.
    """
    methods = {name: score for name, score in scores.items() if name != "base"}
    lowest = min(methods.values(), key=lambda score: score.loss)
    return next(name for name, score in methods.items() if as_good(score, lowest))
