"""Moves and swaps on numpy tables: no model."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.planted import planted, problem_of
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.cluster.d2c import INITS, d2c
from d2c_mlx.cluster.local_search import (
    Costs,
    _best_step,
    _neighbours,
    groups_of,
    improve,
    predicted_partition,
)
from d2c_mlx.cluster.partition import Problem, canonical, random_partition


def asking(problem):
    """The problem, and a list that every merge asked for is added to."""
    asked = []

    def merge(members, like=()):
        asked.append((members, like))
        return problem.merge(members)

    return type(problem)(problem.regrets, merge, problem.measure, problem.features), asked


def partitions(n, n_clusters):
    """Every partition of n into exactly so many clusters."""
    return {
        canonical(labels)
        for labels in itertools.product(range(n_clusters), repeat=n)
        if len(set(labels)) == n_clusters
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("init", INITS)
def test_planted_clusters_are_found_from_any_start(init, seed):
    problem, hidden = planted((3, 4, 2), seed)
    found = d2c(problem, 3, search="moves", init=[init], seed=seed, patience=30)
    assert found.labels == hidden
    assert found.objective == pytest.approx(Costs(problem).objective(hidden))


def test_every_step_gives_another_partition():
    """A swap of two single adapters would use up patience for nothing."""
    groups = [(0,), (1,), (2, 3), (4,)]
    steps = list(_neighbours(groups))
    found = {frozenset({*groups} - {groups[a], groups[b]} | {left, right})
             for a, b, left, right in steps}  # fmt: skip
    # 2 or 3 joins one of three.
    assert len(found) == 6 and frozenset(groups) not in found
    assert all(all(partition) for partition in found)


@pytest.mark.parametrize("seed", range(6))
def test_what_the_loop_of_the_paper_cannot_leave(seed, start_at):
    """Every task prefers the cluster that holds its own adapter: the loop stays, moves do not."""
    rng = np.random.default_rng(seed)
    hidden = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    same = hidden[:, None] == hidden[None, :]
    table = np.where(same, 0.4, 1.0) + rng.uniform(0, 0.05, same.shape)
    np.fill_diagonal(table, 0)

    def loss(members, task):  # with its own adapter inside, any merge beats any other
        value = float(np.mean([table[task, j] for j in members]))
        return value if task in members else 1 + value

    problem = problem_of(loss, 9, table=table)
    drawn = int(np.random.default_rng([seed, 0, 2]).integers(1 << 31))
    start_at(random_partition(9, 3, drawn).labels)
    paper = d2c(problem, 3, search="paper", init=["kmeans"], seed=seed)
    moved = d2c(problem, 3, search="moves", init=["kmeans"], seed=seed, patience=40)
    assert paper.stopped == "converged" and len(paper.history) == 1
    assert moved.labels == canonical(hidden) and moved.objective < paper.objective


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(2, 7), n_clusters=st.integers(1, 6), seed=st.integers(0, 999))
def test_it_ends_where_no_move_and_no_swap_helps(n, n_clusters, seed):
    rng = np.random.default_rng(seed)
    known = {}

    def loss(members, task):
        return known.setdefault((members, task), float(rng.uniform(0, 1)))

    n_clusters = min(n, n_clusters)
    problem, asked = asking(problem_of(loss, n))
    costs = Costs(problem)
    start = [i % n_clusters for i in range(n)]
    history, stopped = improve(costs, start, 0.0, patience=10**6)
    assert stopped == "converged"
    objectives = [entry["objective"] for entry in history]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[-1] == pytest.approx(costs.objective(history[-1]["labels"]))
    assert len(asked) == len(set(asked))
    end = np.array(history[-1]["labels"])
    for i, k in itertools.product(range(n), range(n_clusters)):
        moved = end.copy()
        moved[i] = k
        if len(set(moved)) == n_clusters:
            assert costs.objective(moved) >= objectives[-1] - 1e-9
    for i, j in itertools.combinations(range(n), 2):
        swapped = end.copy()
        swapped[[i, j]] = end[[j, i]]
        assert costs.objective(swapped) >= objectives[-1] - 1e-9


def test_a_cluster_of_one_is_worth_it_for_a_task_that_merges_badly():
    """Balanced clusters are not the aim: the task that suffers lives alone."""
    hard = 4

    def loss(members, task):
        return 0.0 if len(members) == 1 else (0.9 if hard in members else 0.1)

    problem = problem_of(loss, 5)
    history, _ = improve(Costs(problem), [0, 0, 0, 1, 1], 0.0, patience=50)
    assert (hard,) in groups_of(history[-1]["labels"])
    assert [len(set(entry["labels"])) for entry in history] == [2] * len(history)


@pytest.mark.parametrize("helps", ["tuned alone", "at the old scale alone", "both", "neither"])
def test_a_step_is_taken_if_it_helps_at_the_old_scale_and_tuned(helps):
    """Two of four belong together; the scale decides how much of that is seen."""
    good = {"tuned": helps in ("tuned alone", "both"),
            "old": helps in ("at the old scale alone", "both")}  # fmt: skip
    asked = []

    def merge(members, like=()):
        asked.append((members, like))
        return members, like

    def losses(jobs, limits=None):
        def regret(members, like):
            better = {(0, 1), (2, 3)} if good["old" if like else "tuned"] else set()
            return 0.2 if members in better else (0.0, 0.5, 0.9)[len(members) - 1]

        return [np.full(len(tasks), regret(*merged)) for merged, tasks in jobs]

    problem = Problem(1 - np.eye(4), merge, losses, np.eye(4))
    history, _ = improve(Costs(problem), [0, 1, 0, 1], 0.0, patience=20)
    assert (groups_of(history[-1]["labels"]) == [(0, 1), (2, 3)]) == (helps == "both")
    tuned = {members for members, like in asked if not like}
    assert (((0, 1) in tuned) or ((2, 3) in tuned)) == good["old"]
    assert {like for _, like in asked if like} <= tuned


def test_patience_counts_failures_in_a_row():
    problem, asked = asking(problem_of(lambda members, task: 0.5 * (len(members) > 1), 6))
    history, stopped = improve(Costs(problem), [0, 0, 0, 1, 1, 1], 0.0, patience=3)
    assert (len(history), stopped) == (1, "patience")
    assert len(asked) <= 2 + 2 * 3


def test_eps_keeps_a_partition_that_gains_too_little():
    problem, hidden = planted((3, 3), 0)
    start = list(hidden[1:]) + [hidden[0]]
    gain = Costs(problem).objective(start) - Costs(problem).objective(hidden)
    for eps, stays in ((6 * gain + 0.01, True), (0.0, False)):
        history, _ = improve(Costs(problem), start, eps, patience=50)
        assert (len(history) == 1) is stays


@pytest.mark.parametrize("n_clusters", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_the_predicted_partition_is_good_by_its_own_prediction(n_clusters, seed):
    """Asks nothing, fills every cluster, and is the best of all in most small cases."""
    rng = np.random.default_rng(seed)
    table = rng.uniform(0.1, 2, (6, 6))
    np.fill_diagonal(table, 0)
    problem, asked = asking(problem_of(None, 6, base=np.ones(6), table=table))
    labels = predicted_partition(problem, n_clusters)
    assert labels == canonical(labels) and len(set(labels)) == n_clusters and not asked
    predicted = Costs(problem).predicted

    def value(partition):
        return sum(map(predicted, groups_of(partition)))

    best = min(map(value, partitions(6, n_clusters)))
    assert value(labels) <= best + 0.15


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(2, 9), n_clusters=st.integers(1, 8), seed=st.integers(0, 999))
def test_the_best_predicted_step_is_the_best_of_all(n, n_clusters, seed):
    rng, n_clusters = np.random.default_rng(seed), min(n, n_clusters)
    harm = rng.uniform(-0.2, 2, (n, n))
    np.fill_diagonal(harm, 0)
    labels = rng.permutation([*range(n_clusters), *rng.integers(0, n_clusters, n - n_clusters)])

    def value(step=()):
        new = labels.copy()
        for i, k in step:
            new[i] = k
        groups = groups_of(new)
        full = len(groups) == n_clusters
        return sum(harm[np.ix_(one, one)].sum() / len(one) for one in groups) if full else np.inf

    steps = [[pair] for pair in itertools.product(range(n), range(n_clusters))]
    for i, j in itertools.combinations(range(n), 2):
        steps.append([(i, labels[j]), (j, labels[i])])
    best, found = min(map(value, steps)), _best_step(harm, labels, n_clusters)
    if found is None:
        assert best >= value() - 2e-9
    else:
        assert value(found) == pytest.approx(best) and best < value()


def test_a_start_that_costs_least_is_the_one_that_is_improved():
    problem, _ = planted((3, 3), 3, noise=0.4)
    found = d2c(problem, 2, search="moves", init=INITS, restarts=3)
    objectives = [start["objective"] for start in found.starts]
    assert len(objectives) == 5
    assert found.history[0]["objective"] == min(objectives)
    assert found.objective <= min(objectives)


def test_what_is_asked_for_is_foreseen():
    """The steps that are left while none helps, the next one first; nothing in the end."""
    foreseen, asked = [], []

    def merge(members, like=()):
        asked.append((members, len(foreseen)))
        return members

    problem = problem_of(lambda members, task: 0.5 * (len(members) > 1), 6)
    problem = replace(problem, merge=merge, foresee=foreseen.append)
    found = d2c(problem, 2, search="moves", init=["kmeans", "table"], patience=5)
    assert found.stopped == "patience"
    assert [len(some) for some in foreseen] == [10, 6, 5, 4, 3, 2, 1, 0]
    for k, steps in enumerate(foreseen[2:-1]):
        assert steps == foreseen[2][k:] and (steps[0], 3 + k) in asked
