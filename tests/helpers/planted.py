"""Clusters problems on numpy tables, without a model: what merges lose is known."""

import numpy as np

from d2c_mlx.cluster.partition import Fading, Problem, canonical


def merge(members, like=()):
    """A merge is its members; there is no scale."""
    return members


def problem_of(loss, n, features=None):
    """A Problem whose merge is its members and whose regrets are `loss(members, task)`."""

    def measure(jobs):
        return [np.array([loss(members, task) for task in tasks]) for members, tasks in jobs]

    features = np.eye(n) if features is None else features
    return Problem(merge, measure, features, Fading((), np.empty((n, 0))), np.eye(n))


def planted(sizes, seed=0, noise=0.05):
    """`(problem, labels)` of shuffled hidden groups; a merge is worth the mean of its members."""
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(hidden)
    regrets = np.where(hidden[:, None] == hidden, 0.3, 1.2) + rng.uniform(-noise, noise, (n, n))
    np.fill_diagonal(regrets, 0)
    features = np.eye(len(sizes))[hidden] + 0.01 * rng.normal(size=(n, len(sizes)))
    problem = problem_of(lambda members, task: regrets[task, list(members)].mean(), n, features)
    return problem, canonical(hidden)
