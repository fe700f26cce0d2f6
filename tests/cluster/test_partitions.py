"""Partitions that need no search: K-Means, random, all in one."""

import numpy as np
import pytest
from helpers.planted import planted
from hypothesis import given
from hypothesis import strategies as st

from d2c_mlx.cluster.partition import canonical, kmeans, random_partition


def test_canonical():
    assert canonical([2, 0, 2, 5]) == (0, 1, 0, 2)
    assert canonical(np.array([1, 1, 0])) == (0, 0, 1)
    assert canonical([]) == ()
    assert all(type(label) is int for label in canonical(np.array([3, 1])))


@given(st.lists(st.integers(0, 5), max_size=8), st.permutations(range(6)))
def test_canonical_forgets_numbers_only(labels, numbers):
    same = canonical(labels)
    assert canonical([numbers[label] for label in labels]) == same
    assert canonical(same) == same
    for i, one in enumerate(labels):
        assert [one == other for other in labels] == [same[i] == other for other in same]


@given(
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0)
)
def test_random_partition(sizes, seed):
    n, k = sizes
    found = random_partition(n, k, seed)
    assert set(found.labels) == set(range(k))
    assert len(found.groups) == k
    assert found == random_partition(n, k, seed)
    assert (found.method, found.seed, found.labels) == ("random", seed, canonical(found.labels))


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_recovers_planted_features(seed):
    problem, hidden = planted((5, 2, 4), seed)
    found = kmeans(problem.features, 3, seed)
    assert found.labels == hidden
    assert found == kmeans(problem.features, 3, seed)
    assert (found.method, found.seed) == ("kmeans", seed)


@pytest.mark.parametrize("n_clusters", range(1, 7))
def test_kmeans_with_equal_rows_leaves_no_cluster_empty(n_clusters):
    features = np.repeat(np.eye(2), 3, axis=0)
    found = kmeans(features, n_clusters)
    assert len(found.groups) == n_clusters
    assert all(found.groups)
    if n_clusters > 1:
        # Refilling must not mix what K-Means told apart.
        assert all(len({i // 3 for i in group}) == 1 for group in found.groups)
