"""Estimated regrets of merges, and the search by them; truth is a numpy table."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.planted import merge
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.cluster.partition import Fading, Problem, groups_of
from d2c_mlx.cluster.search import (
    STRENGTHS,
    MergeEstimates,
    State,
    estimated_partition,
    improved,
    search_by_estimates,
)


def fading(n, seed=0, most=0.6):
    """Random regrets of weakened adapters, the weaker the higher."""
    regrets = np.sort(np.random.default_rng(seed).uniform(0.02, most, (n, 2)), axis=1)[:, ::-1]
    return Fading(STRENGTHS, regrets)


def problem(n, truth, seed=0):
    """A problem whose regrets `truth(members, task)` gives; it records what is measured."""
    asked = []

    def measure(jobs):
        asked.extend(members for members, _ in jobs)
        return [np.array([truth(members, i) for i in tasks]) for members, tasks in jobs]

    features = np.random.default_rng(seed).normal(size=(n, 4))
    return Problem(merge, measure, features, fading(n, seed), np.eye(n)), asked


def test_an_adapter_at_full_strength_has_no_regret_and_at_none_that_of_the_base():
    weakened = fading(5)
    regrets = weakened.at(np.array([0.0, *STRENGTHS, 1.0]))
    assert regrets[:, 0] == pytest.approx(1) and regrets[:, -1] == pytest.approx(0)
    assert regrets[:, 1:-1] == pytest.approx(weakened.regrets)
    between = weakened.at(np.linspace(0, 1, 50))
    assert (np.diff(between, axis=1) <= 1e-12).all()


def test_larger_clusters_harm_more_alike_adapters_less_and_one_alone_is_not_harmed():
    alike = np.eye(8)
    alike[0, 1] = alike[1, 0] = 0.6
    estimates = MergeEstimates(fading(8), alike)
    assert estimates.of((3,)) == pytest.approx(0)
    by_size = [estimates.of(tuple(range(2, m)))[0] for m in range(4, 9)]
    assert by_size == sorted(by_size) and by_size[0] > 0
    assert estimates.of((0, 1))[0] < estimates.of((0, 2))[0]


def test_what_is_measured_is_learnt():
    """A task that every merge harms three times as much, and a pair that cannot be together."""
    rng, n = np.random.default_rng(0), 10
    plain, estimates = (MergeEstimates(fading(n), np.eye(n)) for _ in range(2))

    def truth(members, i):
        regret = plain.of(members)[members.index(i)]
        harm = 3 if i == 4 else 1
        return regret * harm + (0.8 if i == 0 and 1 in members else 0)

    clusters = [tuple(sorted(rng.choice(n, 4, replace=False).tolist())) for _ in range(60)]
    tests, seen = clusters[:20], clusters[20:]

    def error(of):
        pairs = [(of(c)[j], truth(c, i)) for c in tests for j, i in enumerate(c)]
        return np.mean([abs(np.log((a + 0.03) / (b + 0.03))) for a, b in pairs])

    before = error(estimates.of)
    for members in seen:  # one after the other, as the search does
        estimates.learn({members: np.array([truth(members, i) for i in members])})
    assert error(estimates.of) < before / 2
    assert estimates.pair[0, 1] == estimates.pair[0].max() > 0.3


@settings(max_examples=40)
@given(st.integers(4, 9), st.integers(2, 4), st.integers(0, 999))
def test_gains_of_moves_are_differences_of_costs(n, k, seed):
    rng = np.random.default_rng(seed)
    estimates = MergeEstimates(fading(n, seed), np.eye(n))
    estimates.pair = rng.normal(0, 0.3, (n, n)) * (1 - np.eye(n))
    labels = np.concatenate([np.arange(min(k, n)), rng.integers(0, k, n - min(k, n))])
    state = State(estimates, labels)
    summed = sum(estimates.of(group).sum() for group in groups_of(labels))
    assert state.cost == pytest.approx(summed)
    gains = state.gains()
    for i, to in itertools.product(range(n), range(k)):
        moved = labels.copy()
        moved[i] = to
        if to == labels[i] or len(np.unique(moved)) < k:
            assert gains[i, to] == np.inf
        else:
            after = sum(estimates.of(group).sum() for group in groups_of(moved))
            assert gains[i, to] == pytest.approx(after - summed)


@pytest.mark.parametrize("seed", range(2))
def test_the_estimated_partition_is_close_to_the_best_of_all(seed):
    n, k = 8, 3
    estimates = MergeEstimates(fading(n, seed), np.eye(n))
    rng = np.random.default_rng(seed)
    estimates.pair = rng.normal(0, 0.3, (n, n)) * (1 - np.eye(n))

    def cost(labels):
        return sum(estimates.of(group).sum() for group in groups_of(labels))

    every = [one for one in itertools.product(range(k), repeat=n) if len(set(one)) == k]
    costs = sorted(map(cost, every))
    found = estimated_partition(estimates, k)
    assert len(set(found)) == k
    assert cost(found) <= costs[len(costs) // 100]
    assert cost(improved(estimates, every[0])) <= cost(every[0])


def test_every_merge_is_measured_at_the_scale_of_the_first_and_largest():
    likes = []

    def merge(members, like=()):
        likes.append((members, like))
        return members

    search_by_estimates(replace(problem(10, lambda members, i: 0.1)[0], merge=merge), 3, seed=0)
    (first, nothing), *rest = likes
    assert nothing == () and {like for _, like in rest} == {first}
    assert len(first) == max(len(members) for members, _ in likes[:3])


@pytest.mark.parametrize("n_clusters", [1, 7, 8])
def test_where_nothing_can_move_nothing_is_tried(n_clusters):
    given_problem, asked = problem(8, lambda members, i: 0.1)
    clusters = search_by_estimates(given_problem, n_clusters, seed=0)
    assert len(clusters.groups) == n_clusters
    assert all(len(members) > 1 for members in asked)


@pytest.mark.parametrize("seed", range(2))
def test_it_ends_with_moves_that_only_measuring_can_find(seed):
    """Hidden pairs that harm each other, of which estimates know nothing."""
    plain = MergeEstimates(fading(18, seed), np.eye(18))
    hidden = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], 6))

    def truth(members, i):
        harm = sum(hidden[j] != hidden[i] for j in members)
        return float(plain.of(members)[members.index(i)]) + 0.2 * harm

    given_problem, asked = problem(18, truth, seed)
    clusters = search_by_estimates(given_problem, 3, seed=0)
    regrets = [record["regret"] for record in clusters.history]
    assert clusters.regret == regrets[-1] == min(regrets) < regrets[0]
    assert clusters.stopped == "converged" and len(clusters.groups) == 3
    measured = sum(truth(g, i) for g in clusters.groups if len(g) > 1 for i in g) / 18
    assert clusters.regret == pytest.approx(measured)
    best = sum(truth(g, i) for g in groups_of(hidden) for i in g) / 18
    assert clusters.regret <= best + 0.05
    assert len(asked) == len(set(asked))
