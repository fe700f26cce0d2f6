"""Clusters problems on numpy tables, without a model: what merges lose is known."""

import numpy as np

from d2c_mlx.cluster.partition import Fading, Problem, canonical


def merge(members, like=()):
    """A merge is its members; there is no scale."""
    return members


def problem_of(loss, n, base=None, table=None, features=None):
    """A Problem whose merge is its members and whose losses are `loss(members, task)`.

    By default a task has loss 0 under its own adapter and 1 under the base: a loss is a regret.
    """
    base = np.ones(n) if base is None else np.asarray(base, float)
    table = 1 - np.eye(n) if table is None else np.asarray(table, float)

    own = np.diagonal(table)
    gain = np.maximum(base - own, 0.05)

    def measure(jobs):
        return [
            np.array([(loss(members, task) - own[task]) / gain[task] for task in tasks])
            for members, tasks in jobs
        ]

    features = np.eye(n) if features is None else features
    return Problem(merge, measure, features, Fading((), np.empty((n, 0))), np.eye(n))


def planted(sizes, seed=0, noise=0.05):
    """`(problem, labels)` of shuffled hidden groups; a merge is worth the mean of its members."""
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    n = len(hidden)
    same = hidden[:, None] == hidden[None, :]
    # Tasks differ in difficulty and in what there is to gain, so raw losses are not comparable.
    level, gain = rng.uniform(0.2, 4, n), rng.uniform(0.2, 3, n)
    regret = np.where(same, 0.3, 1.2) + rng.uniform(-noise, noise, (n, n))
    np.fill_diagonal(regret, 0)
    table = level[:, None] + gain[:, None] * regret

    def loss(members, task):
        return float(np.mean([table[task, j] for j in members]))

    features = np.eye(len(sizes))[hidden] + 0.01 * rng.normal(size=(n, len(sizes)))
    return problem_of(loss, n, level + gain, table, features), canonical(hidden)
