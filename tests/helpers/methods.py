"""What every merge method promises: the table that the property tests in tests/merge walk.

The methods of the core come first, then those of examples/plugin, which the test environment has
installed. A new method needs a row here, and `test_every_method_promises_something` says so.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def itself(delta, copies, rank):
    """Equal adapters are what they merge to."""
    return delta


def added_up(delta, copies, rank):
    """Sums of n factors are merged: (n A / sqrt n)(n B / sqrt n)."""
    return copies * delta


def flattened(delta, copies, rank):
    """All directions get the mean of the singular values of the sum."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return copies * s[:rank].mean() * u[:, :rank] @ vt[:rank]


def calibrated(delta, copies, rank):
    """A direction with a larger share of the energy is made smaller, at the same norm."""
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    damped = s / (1 + (copies - 1) * s**2 / (s**2).sum())
    return (u * damped * (np.linalg.norm(s) / np.linalg.norm(damped))) @ vt


def own_rank(copies, columns, directions):
    """The rank of one adapter."""
    return columns


def all_ranks(copies, columns, directions):
    """r / n of r directions are kept of each."""
    return copies * columns


def rank_of_update(copies, columns, directions):
    """What is more would be noise made as large as the rest."""
    return directions


class Promise(NamedTuple):
    """What holds for a method beside what holds for all of them.

    All give one adapter back bit for bit, whatever the order and names of several; stay finite,
    zero for zeros, within the rank that was asked for; and follow a common scale.

    Attributes:
        of_equals: dW of n equal adapters, from their dW, n and the rank of the merge.
        rank_of_equals: the rank that needs, from n, the adapters' rank and that of their dW.
        draws: another seed gives other bytes; "perhaps" where it only starts a search.
        weights: what `weights` weigh: dW, factors, or nothing if it takes none.
        keeps_all_columns: the rank of the result is the sum of ranks, whatever was asked.
        exact: the mean of dW if there is room for it.
    """

    of_equals: Callable = itself
    rank_of_equals: Callable = own_rank
    draws: str | None = None
    weights: str | None = None
    keeps_all_columns: bool = False
    exact: bool = False


# At density 1, where nothing is trimmed or dropped.
PROMISES = {
    "linear": Promise(weights="dW", exact=True),
    "ties": Promise(),
    "tsv": Promise(rank_of_equals=all_ranks),
    "regmean": Promise(),
    "dare-linear": Promise(draws="yes"),
    "dare-ties": Promise(draws="yes"),
    "emr": Promise(),
    "knots": Promise(),
    "iso-c": Promise(flattened, rank_of_update),
    "iso-cts": Promise(flattened, rank_of_update),
    "pico": Promise(calibrated),
    "ctm": Promise(),
    "wudi": Promise(),
    "lego": Promise(draws="perhaps"),
    "concat": Promise(weights="dW", keeps_all_columns=True, exact=True),
    "factor-linear": Promise(of_equals=added_up, weights="factors"),
}
WEIGHTED = [name for name, promise in PROMISES.items() if promise.weights]
