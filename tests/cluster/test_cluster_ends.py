"""How the loop of the paper ends, and which of several starts wins."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.planted import planted, problem_of

from d2c_mlx.cluster import d2c as loop
from d2c_mlx.cluster.d2c import INITS, d2c


def scripted(path, values):
    """A Problem in which D2C, started at path[0], proposes path[1], then path[2], ...

    values[t] is the regret at path[t]. A partition that comes twice moves on as it did first;
    after the last one nothing moves.
    """
    steps = {}
    for t in reversed(range(len(path))):
        steps[_groups(path[t])] = (path[t], path[min(t + 1, len(path) - 1)], values[t])

    def losses(jobs):
        now, then, value = steps[tuple(members for members, _ in jobs)]
        scores = np.full((len(jobs), len(now)), value + 0.5)
        scores[then, np.arange(len(now))] = value - 0.1
        scores[now, np.arange(len(now))] = value
        return [scores[k][list(tasks)] for k, (_, tasks) in enumerate(jobs)]

    n = len(path[0])
    return replace(problem_of(None, n), measure=losses)


def _groups(labels):
    return tuple(
        tuple(int(i) for i in np.flatnonzero(np.array(labels) == k)) for k in range(max(labels) + 1)
    )


A, B, C, D, E = [0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]


def run(path, values, start_at, **options):
    start_at(path[0])
    return d2c(scripted(path, values), 2, init=["adapters"], **options)


def test_converged(start_at):
    found = run([A, B, C], [0.9, 0.5, 0.3], start_at)
    assert (found.labels, found.regret, found.stopped) == ((0, 1, 1, 1), 0.3, "converged")
    assert [one["labels"] for one in found.history] == [A, B, C]
    assert [one["regret"] for one in found.history] == pytest.approx([0.9, 0.5, 0.3])


def test_clusters_that_only_swap_numbers_have_converged(start_at):
    found = run([B, [1, 1, 0, 0]], [0.5, 0.5], start_at)
    assert (found.labels, found.stopped, len(found.history)) == ((0, 0, 1, 1), "converged", 1)


@pytest.fixture
def stale_rounds(monkeypatch):
    """Let the loop go on for so many rounds without a new best."""
    return lambda n: monkeypatch.setattr(loop, "_STALE_ROUNDS", n)


def test_repeated_partition(start_at, stale_rounds):
    # Task 1 flees from wherever it is merged into: a cycle of two.
    def loss(members, task):
        if task == 1:
            return 1.0 if 1 in members else 0.5
        return 0.0 if task in members else 1.0

    start_at([0, 0, 1, 1])
    stale_rounds(100)
    found = d2c(problem_of(loss, 4), 2, init=["adapters"], rounds=100)
    assert found.stopped == "repeated"
    assert [one["labels"] for one in found.history] == [[0, 0, 1, 1], [0, 1, 1, 1]]
    # Both are equally good: the first stays the best.
    assert found.labels == (0, 0, 1, 1)


@pytest.mark.parametrize("path", [[A, B, C, [1, 1, 0, 0]], [A, [1, 1, 0, 0], C, B]])
def test_longer_cycle_under_other_numbers(path, start_at, stale_rounds):
    # The cycle closes with the clusters of B numbered the other way round.
    stale_rounds(100)
    found = run(path, [0.9, 0.4, 0.6, 0.4], start_at)
    assert (found.stopped, len(found.history)) == ("repeated", 3)
    assert (found.labels, found.regret) == ((0, 0, 1, 1), 0.4)


@pytest.mark.parametrize(("rounds", "last"), [(0, A), (1, B), (3, D)])
def test_limit_of_rounds(rounds, last, start_at):
    found = run([A, B, C, D, E], [0.9, 0.8, 0.7, 0.6, 0.5], start_at, rounds=rounds)
    assert (list(found.labels), found.stopped) == (last, "rounds")
    assert len(found.history) == rounds + 1


@pytest.mark.parametrize(("stale", "measured"), [(1, 3), (None, 4), (2, 4), (3, 5)])
def test_no_progress(stale, measured, start_at, stale_rounds):
    path, values = [A, B, C, D, E, [0, 1, 0, 0]], [0.5, 0.2, 0.6, 0.3, 0.4, 0.3]
    if stale:  # None: the two rounds that every run has
        stale_rounds(stale)
    found = run(path, values, start_at)
    assert (found.stopped, len(found.history)) == ("no progress", measured)
    assert (list(found.labels), found.regret) == (B, 0.2)


def test_a_new_best_restores_patience(start_at):
    values = [0.5, 0.6, 0.4, 0.45, 0.3]
    found = run([A, B, C, D, E], values, start_at)
    assert (found.stopped, found.regret) == ("converged", 0.3)


def test_the_best_seen_is_returned_not_the_last(start_at, stale_rounds):
    stale_rounds(10)
    found = run([A, B, C, D], [0.9, 0.2, 0.8, 0.7], start_at)
    assert (list(found.labels), found.regret, found.stopped) == (B, 0.2, "converged")
    assert found.history[-1] == {"regret": pytest.approx(0.7), "labels": D}


@pytest.mark.parametrize("winner", INITS)
@pytest.mark.parametrize("order", [INITS, INITS[::-1]])
def test_the_best_start_wins(winner, order, start_at):
    starts = dict(zip(INITS, [B, D]))
    value = {_groups(labels): 0.5 for labels in starts.values()}
    value[_groups(starts[winner])] = 0.25
    start_at(starts)

    def losses(jobs):  # nobody moves
        now = value[tuple(members for members, _ in jobs)]
        return [
            np.array([now if task in members else 2.0 for task in tasks]) for members, tasks in jobs
        ]

    problem = replace(problem_of(None, 4), measure=losses)
    found = d2c(problem, 2, init=order)
    assert (found.init, list(found.labels), found.regret) == (winner, starts[winner], 0.25)
    assert found.history == [{"regret": 0.25, "labels": starts[winner]}]


@pytest.mark.parametrize("order", [INITS, INITS[::-1]])
def test_the_first_of_equal_starts_wins(order, start_at):
    start_at(dict(zip(INITS, [B, D])))
    problem = problem_of(lambda members, task: 0.5, 4)
    assert d2c(problem, 2, init=order).init == order[0]


def test_a_start_of_regret_zero_is_not_replaced(start_at):
    start_at({"adapters": B, "kmeans": D})
    problem = problem_of(lambda members, task: 0.0 if members in _groups(B) else 0.5, 4)
    assert d2c(problem, 2, init=["adapters", "kmeans"]).labels == tuple(B)


def test_number_of_starts(monkeypatch):
    kinds = []
    start = loop._start
    monkeypatch.setattr(loop, "_start", lambda *a: kinds.append(a[2]) or start(*a))
    problem, _ = planted((3, 3))
    d2c(problem, 2, init=INITS, restarts=3)
    assert kinds == ["adapters"] * 3 + ["kmeans"]
    kinds.clear()
    d2c(problem, 1, init=INITS, restarts=3)
    assert kinds == ["adapters"]
