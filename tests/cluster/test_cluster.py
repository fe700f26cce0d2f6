"""The paper's loop against a plain one, the baselines, and the search by estimates."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.cluster import partition as loop
from d2c_mlx.cluster.partition import (
    INITS,
    Fading,
    Problem,
    canonical,
    d2c,
    groups_of,
    kmeans,
    measured_regret,
    random_partition,
    refill,
)
from d2c_mlx.cluster.search import (
    STRENGTHS,
    MergeEstimates,
    State,
    estimated_partition,
    improved,
    search_by_estimates,
)


def merge(members, like=()):
    """There is no scale."""
    return members


def problem_of(loss, n, features=None):
    """A Problem whose merge is its members and whose regrets are `loss(members, task)`."""

    def measure(jobs):
        return [np.array([loss(members, task) for task in tasks]) for members, tasks in jobs]

    features = np.eye(n) if features is None else features
    fading = Fading((), np.empty((n, 0)))
    return Problem(merge, measure, features, fading, np.eye(n), np.ones(n))


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(3, 3), (4, 2, 3), (5, 1, 4, 2)], ids=str)
def test_planted_clusters_are_recovered_from_adapters(sizes, seed):
    problem, hidden = planted(sizes, seed)
    clusters = d2c(problem, len(sizes), init=["adapters"], seed=seed)
    assert (clusters.labels, clusters.seed) == (hidden, seed)
    assert (clusters.method, clusters.init, clusters.stopped) == ("d2c", "adapters", "converged")
    # The farthest adapters, with which it starts, are of different groups.
    assert d2c(problem, len(sizes), init=["adapters"], rounds=0, seed=seed).labels == hidden


def plain_loop(loss, labels, n_clusters, rounds, eps):
    """The loop in plain Python: `(history, labels and regret of the best, why it stopped)`."""
    history, seen, best, stale = [], [], None, 0
    labels = list(labels)
    for _ in range(rounds + 1):
        seen.append(canonical(labels))
        groups = [tuple(i for i, k in enumerate(labels) if k == c) for c in range(n_clusters)]
        scores = [[loss(members, task) for members in groups] for task in range(len(labels))]
        regret = float(np.mean([row[k] for row, k in zip(scores, labels)]))
        history.append((list(canonical(labels)), regret))
        if best is None or regret < best[1] - 1e-12:
            best, stale = history[-1], 0
        else:
            stale += 1
            if stale == 2:
                return history, best, "no progress"
        moved = []
        for row, k in zip(scores, labels):
            wish = row.index(min(row))
            moved.append(wish if row[wish] < row[k] - eps else k)
        for empty in sorted(set(range(n_clusters)) - set(moved)):
            # The worst served of those that are not alone, the first of equals.
            free = [i for i, k in enumerate(moved) if moved.count(k) > 1]
            moved[max(free, key=lambda i: (scores[i][moved[i]], -i))] = empty
        if canonical(moved) == canonical(labels):
            return history, best, "converged"
        if canonical(moved) in seen:
            return history, best, "repeated"
        labels = moved
    return history, best, "rounds"


@settings(max_examples=150)
@given(
    st.integers(2, 6), st.integers(1, 5), st.integers(0, 10_000), st.integers(0, 4),
    st.sampled_from([0.0, 0.125, 0.25]), st.sampled_from([2, 4, 1000]),
)  # fmt: skip
def test_the_loop_is_the_plain_one(n, n_clusters, seed, rounds, eps, steps):
    """With few steps many regrets are equal, or differ by just `eps`."""
    n_clusters = min(n_clusters, n - 1)
    rng = np.random.default_rng(seed)
    regrets = {}

    def loss(members, task):
        return regrets.setdefault((members, task), int(rng.integers(0, steps + 1)) / steps)

    start = refill(rng.integers(n_clusters, size=n), n_clusters, rng.random(n))
    clusters = loop._loop(problem_of(loss, n), start, rounds, eps)
    history, best, stopped = plain_loop(loss, start, n_clusters, rounds, eps)
    assert [(step["labels"], step["regret"]) for step in clusters.history] == history
    assert (list(clusters.labels), clusters.regret, clusters.stopped) == (*best, stopped)
    assert sorted(sum(clusters.groups, ())) == list(range(n))


def test_the_regret_of_clusters_is_the_weighted_mean_of_the_tasks():
    problem, hidden = planted((2, 3), 3)
    problem = replace(problem, weights=np.array([0.5, 2.0, 1.0, 0.3, 1.2]))
    each = [problem.weights[list(x)] @ problem.measure([(x, x)])[0] for x in groups_of(hidden)]
    assert measured_regret(problem, hidden) == pytest.approx(sum(each) / 5)
    estimates = MergeEstimates(fading(5), np.eye(5), problem.weights)
    plain = MergeEstimates(fading(5), np.eye(5)).of((0, 2, 3))
    assert estimates.of((0, 2, 3)) == pytest.approx(plain * [0.5, 1.0, 0.3])
    estimates.learn({(0, 2): np.array([0.2, 0.4])})
    assert estimates.of((0, 2)) == pytest.approx([0.1, 0.4])
    # As many clusters as adapters: nothing is merged or measured.
    for n_clusters in (5, 100):
        clusters = d2c(replace(problem, merge=None, measure=None), n_clusters)
        assert clusters.groups == [(0,), (1,), (2,), (3,), (4,)]
        assert (clusters.regret, clusters.stopped) == (0.0, "converged")


def test_the_best_start_wins_and_the_first_of_equal_ones():
    problem, _ = planted((3, 3, 3), 1, noise=0.8)
    alone = [d2c(problem, 3, init=[init], rounds=0) for init in INITS]
    assert alone[0].regret != alone[1].regret
    best = min(alone, key=lambda clusters: clusters.regret)
    assert d2c(problem, 3, rounds=0) == d2c(problem, 3, init=INITS[::-1], rounds=0) == best
    equal = problem_of(lambda members, task: 0.5, 4)
    assert [d2c(equal, 2, init=order).init for order in (INITS, INITS[::-1])] == [*INITS]
    # One cluster needs no second start.
    assert d2c(problem, 1, init=INITS[::-1]).init == INITS[1]
    assert d2c(problem, 1).labels == (0,) * 9
    problem, _ = planted((8, 8, 8), 0, noise=0.8)
    starts = {d2c(problem, 3, init=["adapters"], rounds=0, seed=seed).labels for seed in range(8)}
    assert len(starts) > 4


@given(st.lists(st.integers(0, 5), max_size=8), st.permutations(range(6)))
def test_canonical_forgets_numbers_only(labels, numbers):
    same = canonical(labels)
    assert canonical([numbers[label] for label in labels]) == same
    assert canonical(same) == same
    for i, own in enumerate(labels):
        assert [own == other for other in labels] == [same[i] == other for other in same]


@given(st.integers(1, 12), st.data(), st.integers(0))
def test_random_partition(n, data, seed):
    k = data.draw(st.integers(1, n))
    clusters = random_partition(n, k, seed)
    assert clusters.labels == canonical(clusters.labels) and len(clusters.groups) == k
    assert clusters == random_partition(n, k, seed)
    assert (clusters.method, clusters.seed) == ("random", seed)


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_recovers_planted_features_and_leaves_no_cluster_empty(seed):
    problem, hidden = planted((5, 2, 4), seed)
    clusters = kmeans(problem.features, 3, seed)
    assert clusters == kmeans(problem.features, 3, seed)
    assert (clusters.method, clusters.seed, clusters.labels) == ("kmeans", seed, hidden)
    for n_clusters in range(1, 7):
        groups = kmeans(np.repeat(np.eye(2), 3, axis=0), n_clusters).groups
        assert len(groups) == n_clusters
        # Refilling must not mix what K-Means told apart.
        assert n_clusters == 1 or all(len({i // 3 for i in group}) == 1 for group in groups)


# Estimated regrets of merges, and the search by them


def fading(n, seed=0, most=0.6):
    """Random regrets of weakened adapters, the weaker the higher."""
    regrets = np.sort(np.random.default_rng(seed).uniform(0.02, most, (n, 2)), axis=1)[:, ::-1]
    return Fading(STRENGTHS, regrets)


def problem(n, truth, seed=0):
    """A problem whose regrets `truth(members, task)` gives; it records what is merged like what."""
    asked = []

    def merge(members, like=()):
        asked.append((members, like))
        return members

    features = np.random.default_rng(seed).normal(size=(n, 4))
    return replace(problem_of(truth, n, features), merge=merge, fading=fading(n, seed)), asked


def test_regrets_are_those_of_the_base_at_no_strength_and_grow_with_a_cluster():
    weakened = fading(5)
    regrets = weakened.at(np.array([0.0, *STRENGTHS, 1.0]))
    assert regrets[:, 0] == pytest.approx(1) and regrets[:, -1] == pytest.approx(0)
    assert regrets[:, 1:-1] == pytest.approx(weakened.regrets)
    between = weakened.at(np.linspace(0, 1, 50))
    assert (np.diff(between, axis=1) <= 1e-12).all()
    # Larger clusters harm more, alike adapters less, and one alone is not harmed.
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


def paired(n, seed):
    """Estimates that have learnt random pairs."""
    rng, estimates = np.random.default_rng(seed), MergeEstimates(fading(n, seed), np.eye(n))
    estimates.pair = rng.normal(0, 0.3, (n, n)) * (1 - np.eye(n))
    return estimates, rng


def cost_of(estimates, labels):
    return sum(estimates.of(group).sum() for group in groups_of(labels))


@settings(max_examples=40)
@given(st.integers(4, 9), st.integers(2, 4), st.integers(0, 999))
def test_gains_of_moves_are_differences_of_costs(n, k, seed):
    estimates, rng = paired(n, seed)
    labels = np.concatenate([np.arange(min(k, n)), rng.integers(0, k, n - min(k, n))])
    state = State(estimates, labels)
    summed = cost_of(estimates, labels)
    assert state.cost == pytest.approx(summed)
    gains = state.gains()
    for i, to in itertools.product(range(n), range(k)):
        moved = labels.copy()
        moved[i] = to
        if to == labels[i] or len(np.unique(moved)) < k:
            assert gains[i, to] == np.inf
        else:
            assert gains[i, to] == pytest.approx(cost_of(estimates, moved) - summed)


@pytest.mark.parametrize("seed", range(2))
def test_the_estimated_partition_is_close_to_the_best_of_all(seed):
    n, k = 8, 3
    estimates, _ = paired(n, seed)
    cost = partial(cost_of, estimates)
    every = [labels for labels in itertools.product(range(k), repeat=n) if len(set(labels)) == k]
    best = estimated_partition(estimates, k)
    assert len(set(best)) == k
    assert cost(best) <= sorted(map(cost, every))[len(every) // 100]
    assert cost(improved(estimates, every[0])) <= cost(every[0])


def test_every_merge_has_the_scale_of_the_first_and_where_nothing_can_move_none_is_tried():
    given_problem, asked = problem(10, lambda members, i: 0.1)
    search_by_estimates(given_problem, 3, seed=0)
    (first, nothing), *rest = asked
    assert nothing == () and {like for _, like in rest} == {first}
    assert len(first) == max(len(members) for members, _ in asked[:3])
    for n_clusters in (1, 7, 8):
        given_problem, asked = problem(8, lambda members, i: 0.1)
        clusters = search_by_estimates(given_problem, n_clusters, seed=0)
        assert len(clusters.groups) == n_clusters
        assert all(len(members) > 1 for members, _ in asked)


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
