"""WUDI and RegMean, which solve for the merge, against dense solutions in float64."""

import numpy as np
import pytest
import scipy.linalg
from d2c_mlx_methods.wudi import wudi
from helpers.loras import (
    NUMERIC,
    P,
    Q,
    R,
    adapters_of,
    as_space,
    assert_close,
    assert_merges,
    counts,
    deltas,
    dense,
    dense_grams,
    dims,
    inputs_of,
    mixed_ranks,
    seeds,
    truncated,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from d2c_mlx.merge.combine import Grams, regmean
from d2c_mlx.merge.methods import merge_adapters


@settings(NUMERIC, max_examples=30)
@given(st.tuples(dims, dims), counts, seeds)
def test_wudi_is_the_least_squares_solution(shape, n, seed):
    adapters = mixed_ranks(n, shape, seed)
    tasks = [delta for delta in deltas(adapters) if np.linalg.norm(delta)]
    # Transposed: t_i t^T = t_i t_i^T for all i at once, each row divided by |t_i|.
    left = np.concatenate([t / np.linalg.norm(t) for t in tasks])
    right = np.concatenate([t @ t.T / np.linalg.norm(t) for t in tasks])
    s = np.linalg.svd(left, compute_uv=False)
    assume(not ((s > 1e-6) & (s < 1e-3)).any())  # What float32 factors hardly hold.
    expected = np.linalg.lstsq(left, right, rcond=1e-5)[0].T
    assert_merges(adapters, "wudi", expected, 1e-3)


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4])
def test_wudi_tells_similar_inputs_apart(angle):
    """Two tasks of one input each: the result does to it what the task did."""
    inputs = np.array([[1.0, 0.0, 0.0], [np.cos(angle), np.sin(angle), 0.0]])
    outputs = np.array([[2.0, -1.0], [0.5, 3.0]])
    found = wudi(as_space(np.stack([np.outer(y, x) for x, y in zip(inputs, outputs)])))
    assert found @ inputs.T == pytest.approx(outputs.T, rel=1e-4)


def dense_regmean(tasks, inputs, off_diagonal, ridge):
    """The normal equations with every matrix formed."""
    grams = dense_grams(inputs, off_diagonal, ridge)
    right = sum(gram @ task.T for gram, task in zip(grams, tasks))
    return np.linalg.solve(sum(grams), right).T


@settings(NUMERIC, max_examples=30)
@given(st.tuples(dims, dims), counts, st.sampled_from([1, 2, 30]), seeds)
def test_regmean_is_the_dense_one(shape, n, n_tokens, seed):
    adapters = mixed_ranks(n, shape, seed)
    inputs = inputs_of(adapters, n_tokens)
    expected = dense_regmean(deltas(adapters), inputs[P], 0.9, 1e-6)
    assert_merges(adapters, "regmean", expected, 1e-4, activations=inputs)
    # In a rank: the nearest where the distance is that of the outputs.
    rank = 1 + seed % 3
    found = merge_adapters(adapters, "regmean", rank=rank, activations=inputs).modules[P]
    assert found.rank <= rank
    root = scipy.linalg.sqrtm(sum(dense_grams(inputs[P], 0.9, 1e-6))).real
    best = truncated(expected @ root, rank)
    lost, least = (np.linalg.norm(one - expected @ root) for one in (dense(found) @ root, best))
    assert lost <= least + 1e-4 * np.linalg.norm(expected @ root) + 1e-5


@settings(NUMERIC, max_examples=30)
@given(
    st.tuples(dims, dims),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    st.sampled_from([1e-3, 1e-1, 10.0]),
    st.integers(1, 12),
    seeds,
)
def test_regmean_options(shape, off_diagonal, ridge, n_tokens, seed):
    rng = np.random.default_rng(seed)
    factors = [(rng.normal(size=(shape[0], 2)), rng.normal(size=(2, shape[1]))) for _ in range(3)]
    inputs = [rng.normal(size=(n_tokens + i, shape[0])) for i in range(3)]
    a, b = regmean(factors, Grams(inputs, off_diagonal, ridge), 6)
    found = (a @ b).T
    tasks = [(a @ b).T for a, b in factors]
    assert found == pytest.approx(dense_regmean(tasks, inputs, off_diagonal, ridge), abs=1e-7)


def test_regmean_without_data_is_the_mean():
    adapters = mixed_ranks(3, (7, 5), 0)
    for inputs in (np.zeros((4, 7)), np.zeros((0, 7))):
        activations = {P: [inputs] * 3}
        assert_merges(adapters, "regmean", sum(deltas(adapters)) / 3, activations=activations)


def test_regmean_takes_a_square_root_of_a_gram_matrix():
    adapters = mixed_ranks(3, (7, 5), 1)
    inputs = inputs_of(adapters, 20)
    roots = {P: [scipy.linalg.sqrtm(x.T @ x).real for x in inputs[P]]}
    found = merge_adapters(adapters, "regmean", rank=100, activations=roots).modules[P]
    expected = merge_adapters(adapters, "regmean", rank=100, activations=inputs).modules[P]
    assert_close(dense(found), dense(expected), np.linalg.norm(dense(expected)), 1e-5)


def test_regmean_of_modules_with_the_same_inputs_is_that_of_each():
    adapters = adapters_of(np.random.default_rng(0), 4, {P: (9, 7), Q: (9, 5), R: (6, 9)})
    inputs = inputs_of(adapters)
    shared = {**inputs, Q: inputs[P]}
    apart = {**shared, Q: [x.copy() for x in inputs[P]]}
    together, alone, other = (
        merge_adapters(adapters, "regmean", activations=one) for one in (shared, apart, inputs)
    )
    assert together.digest == alone.digest
    assert together.digest != other.digest
