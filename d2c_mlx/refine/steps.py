"""Steps of a training: rates, rows, averages, and gradients of what factors are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from d2c_mlx.evaluate.distill import Factors, TeacherRow

__all__ = ["Parameters", "averaged", "descend", "pull_back", "turns"]

# Arrays in dicts and tuples: what is trained.
Parameters = Any

# Least weight of a step in the average; the first steps count alike.
_NEWEST = 0.1


def turns(rows: Sequence[TeacherRow], n: int, seed: Sequence[int]) -> Iterator[list[TeacherRow]]:
    """Yield `n` rows at a time, in rounds that have every row once, in a new order."""
    rng = np.random.default_rng(seed)
    waiting: list[TeacherRow] = []
    n = min(n, len(rows))
    while True:
        while len(waiting) < n:
            waiting += [rows[i] for i in rng.permutation(len(rows))]
        yield waiting[:n]
        del waiting[:n]


def descend(
    parameters: Parameters, gradient: Callable[[Parameters], Parameters], steps: int, rate: float
) -> Iterator[Parameters]:
    """Yield the parameters after each step of Adam.

    Its learning rate rises to `rate` over a tenth of the steps, then falls as a cosine.
    """
    warm = steps // 10
    schedule = optim.cosine_decay(rate, max(1, steps - warm))
    if warm:
        rising = optim.linear_schedule(rate / warm, rate, warm)
        schedule = optim.join_schedules([rising, schedule], [warm])
    optimizer = optim.Adam(schedule, betas=[0.9, 0.99], bias_correction=True)
    for _ in range(steps):
        clipped, _ = optim.clip_grad_norm(gradient(parameters), 1.0)
        parameters = optimizer.apply_gradients(clipped, parameters)
        mx.eval(parameters, optimizer.state)
        yield parameters


def averaged(average: Parameters, newest: Parameters, step: int) -> Parameters:
    """The average of the start and of what every step made, the latest ones in the main."""
    share = max(_NEWEST, 1 / (step + 1))
    return tree_map(lambda old, new: old + share * (new - old), average, newest)


def pull_back(
    make: Callable[[Parameters], Factors], parameters: Parameters, gradient: Factors
) -> Parameters:
    """The gradient of the parameters, from that of the factors which `make` makes of them."""

    def inner(values: Parameters) -> mx.array:
        products = tree_map(lambda x, g: (x * g).sum(), make(values), gradient)
        return sum(x for _, x in tree_flatten(products))

    return mx.grad(inner)(parameters)
