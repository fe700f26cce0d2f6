"""The rounds of the paper's loop: starts, tasks that move, clusters that fall empty."""

import dataclasses

import numpy as np
import pytest
from helpers.planted import planted, problem_of
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.cluster import d2c as loop
from d2c_mlx.cluster.d2c import INITS, d2c
from d2c_mlx.cluster.partition import canonical, measured_regret, refill


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sizes", [(3, 3), (4, 2, 3), (5, 1, 4, 2)], ids=str)
def test_recovers_planted_clusters_from_adapters(sizes, seed):
    problem, hidden = planted(sizes, seed)
    found = d2c(problem, len(sizes), init=["adapters"], seed=seed)
    assert found.labels == hidden
    assert (found.method, found.init, found.stopped) == ("d2c", "adapters", "converged")
    assert found.seed == seed


@pytest.mark.parametrize("seed", range(8))
def test_farthest_adapters_start_in_every_group(seed):
    problem, hidden = planted((4, 2, 3, 3), seed)
    assert d2c(problem, 4, init=["adapters"], rounds=0, seed=seed).labels == hidden


@pytest.mark.parametrize("seed", range(5))
def test_every_further_adapter_is_that_of_the_task_served_worst(seed):
    table = np.random.default_rng(seed).random((7, 7))
    np.fill_diagonal(table, 0)
    asked = []

    def loss(members, task):
        asked.append(members)
        return table[task, members[0]]

    labels = loop._start(problem_of(loss, 7), 5, "adapters", np.random.default_rng(seed))
    (first, *further) = [one for (one,) in dict.fromkeys(asked)]
    chosen = [first]
    for one in further:
        served = table[:, chosen].min(axis=1)
        assert one not in chosen and served[one] == served.max()
        chosen.append(one)
    assert len(chosen) == 5 and len(asked) == 5 * 7
    assert (labels == table[:, chosen].argmin(axis=1)).all()


def test_equal_adapters_still_start_in_distinct_clusters():
    problem = problem_of(lambda members, task: 0.0, 5)
    for seed in range(5):
        for k in (2, 3, 4):
            labels = loop._start(problem, k, "adapters", np.random.default_rng(seed))
            assert len(set(labels)) == k


def test_a_task_joins_the_adapter_that_serves_it_best():
    # Task 2 is served better by 1, and 1 better by 2, than by 0; adapter 0 is alike to all.
    table = np.array([[0.0, 0.9, 0.9], [0.8, 0.0, 0.2], [0.8, 0.2, 0.0]])
    problem = problem_of(lambda m, i: np.mean([table[i, j] for j in m]), 3, table=table)
    for seed in range(5):
        assert d2c(problem, 2, init=["adapters"], rounds=0, seed=seed).labels == (0, 1, 1)


@pytest.mark.parametrize("seed", range(6))
def test_reassignment_repairs_a_wrong_start(seed, start_at):
    problem, hidden = planted((4, 4, 4), seed)
    wrong = np.array(hidden)
    # One task of each group goes to the next group.
    for group in range(3):
        wrong[hidden.index(group)] = (group + 1) % 3
    start_at(wrong)
    assert d2c(problem, 3, init=["adapters"], rounds=0).labels == canonical(wrong)
    found = d2c(problem, 3, init=["adapters"])
    assert found.labels == hidden
    assert len(found.history) > 1
    assert found.regret == pytest.approx(found.history[-1]["regret"])


def test_regret_is_the_mean_normalised_regret(start_at):
    problem, hidden = planted((2, 3), 3)
    start_at(hidden)
    found = d2c(problem, 2, init=["adapters"])
    total = 0.0
    for task, label in enumerate(hidden):
        members = tuple(j for j in range(5) if hidden[j] == label)
        total += problem.measure([(members, [task])])[0][0]
    assert found.regret == pytest.approx(total / 5)
    assert measured_regret(problem, hidden) == pytest.approx(total / 5)


def test_one_cluster():
    problem, _ = planted((3, 2))
    found = d2c(problem, 1, restarts=3)
    assert found.labels == (0,) * 5
    assert found.n_clusters == 1
    assert len(found.history) == 1
    assert found.stopped == "converged"


@pytest.mark.parametrize("n_clusters", [4, 5, 100])
def test_as_many_clusters_as_adapters_keeps_everyone_alone(n_clusters):
    def never(*_):
        raise AssertionError("nothing needs to be merged or measured")

    problem = dataclasses.replace(planted((2, 2))[0], merge=never, measure=never)
    found = d2c(problem, n_clusters)
    assert found.labels == (0, 1, 2, 3)
    assert found.groups == [(0,), (1,), (2,), (3,)]
    assert (found.regret, found.stopped) == (0.0, "converged")


@pytest.mark.parametrize("n_clusters", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_an_emptied_cluster_is_refilled(n_clusters, seed):
    # Whatever is merged with adapter 0 is best for all: everyone leaves for its cluster.
    def loss(members, task):
        return 0.1 * (task + 1) if 0 in members else 2.0

    for init in INITS:
        found = d2c(problem_of(loss, 5), n_clusters, init=[init], seed=seed)
        assert found.n_clusters == n_clusters
        assert all(found.groups)
        for one in found.history:
            assert set(one["labels"]) == set(range(n_clusters))


def test_the_worst_served_task_refills(start_at):
    def loss(members, task):
        return [0.1, 0.2, 0.3, 0.9][task] if 0 in members else 2.0

    start_at([0, 0, 1, 1])
    found = d2c(problem_of(loss, 4), 2, init=["adapters"])
    # Both tasks of cluster 1, served alike there, leave it. In cluster 0 task 3 is served worst.
    assert found.history[1]["labels"] == [0, 0, 0, 1]
    assert found.labels == (0, 0, 0, 1)


def test_refill_passes_over_tasks_that_live_alone():
    assert refill(np.array([0, 1, 1]), 3, np.array([9.0, 1, 2])).tolist() == [0, 1, 2]
    assert refill(np.array([2, 1, 1]), 3, np.array([9.0, 2, 1])).tolist() == [2, 0, 1]


def test_refill_ties_take_the_lowest_index():
    assert refill(np.array([1, 1, 1, 1]), 3, np.zeros(4)).tolist() == [0, 2, 1, 1]


def test_refill_leaves_full_partitions_and_its_input_alone():
    labels = np.array([1, 0, 1])
    assert refill(labels, 2, np.arange(3.0)).tolist() == [1, 0, 1]
    refill(labels, 3, np.arange(3.0))
    assert labels.tolist() == [1, 0, 1]


@settings(max_examples=60)
@given(st.data())
def test_refill_moves_as_few_as_it_can(data):
    n = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, n))
    labels = np.array(data.draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n)))
    worst = np.array(data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n)), float)
    full = refill(labels, k, worst)
    assert set(full) == set(range(k))
    assert (full != labels).sum() == k - len(set(labels))


@pytest.mark.parametrize(("eps", "moves"), [(0.25, False), (0.24, True), (0.5, False), (0, True)])
def test_a_task_stays_unless_it_gains_more_than_eps(eps, moves, start_at):
    # Task 1 gains exactly 0.25 by leaving; the others are at home.
    def loss(members, task):
        if task == 1:
            return 0.5 if 0 in members else 0.25
        return 0.0 if task in members else 1.0

    start_at([0, 0, 1])
    found = d2c(problem_of(loss, 3), 2, init=["adapters"], eps=eps)
    assert found.labels == ((0, 1, 1) if moves else (0, 0, 1))
    assert found.stopped == "converged"


def test_a_tie_keeps_a_task_where_it_is(start_at):
    # Everything is equal, so argmin names cluster 0 for all: nobody may move, even with eps 0.
    start_at([0, 1, 1, 0])
    found = d2c(problem_of(lambda members, task: 0.5, 4), 2, init=["adapters"], eps=0)
    assert found.labels == (0, 1, 1, 0)
    assert (found.stopped, len(found.history)) == ("converged", 1)


def test_restarts_differ_and_can_only_help():
    problem, _ = planted((3, 3, 3), 1, noise=0.8)
    once = d2c(problem, 3, init=["adapters"], rounds=0)
    often = d2c(problem, 3, init=["adapters"], rounds=0, restarts=20)
    assert often.regret < once.regret


@pytest.mark.parametrize("seed", range(3))
def test_same_seed_same_result(seed):
    problem, _ = planted((3, 3, 3), seed, noise=0.6)
    for init in [INITS, *([kind] for kind in INITS)]:
        first = d2c(problem, 3, init=init, seed=seed, restarts=2)
        assert d2c(problem, 3, init=init, seed=seed, restarts=2) == first


def test_seeds_start_at_different_partitions():
    problem, _ = planted((8, 8, 8), 0, noise=0.8)
    starts = {d2c(problem, 3, init=["adapters"], rounds=0, seed=seed).labels for seed in range(8)}
    assert len(starts) > 4


@settings(max_examples=25)
@given(st.integers(2, 7), st.integers(1, 7), st.integers(0, 10_000), st.sampled_from(INITS))
def test_any_table(n, n_clusters, seed, init):
    rng = np.random.default_rng(seed)
    value = {}

    def loss(members, task):
        return value.setdefault((members, task), rng.random())

    features = rng.normal(size=(n, 3))
    problem = problem_of(loss, n, 2 * np.ones(n), features=features)
    found = d2c(problem, n_clusters, init=[init], seed=seed)
    assert found.n_clusters == min(n, n_clusters)
    assert found.labels == canonical(found.labels)
    assert sorted(sum(found.groups, ())) == list(range(n))
    if found.history:
        best = min(found.history, key=lambda one: one["regret"])
        assert (list(found.labels), found.regret) == (best["labels"], best["regret"])
        assert len({tuple(one["labels"]) for one in found.history}) == len(found.history)
