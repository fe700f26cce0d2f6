"""Mixes of adapters against dense sums, and weights against their formulas."""

import mlx.core as mx
import numpy as np
import pytest
from d2c_mlx_methods.compose import continual_weights, search_weights
from helpers.loras import P, Q, adapters_of, assert_close, dense, lora_of, truncated

from benchmarks.new_task.controls import mix_factors, random_like
from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compose.methods import mix, similarity_weights

SHAPES = {P: (7, 9), Q: (5, 6)}


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [1.5, -0.7, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("rank", [2, 40])
def test_a_mix_is_the_dense_sum_in_its_rank(weights, rank):
    adapters = adapters_of(np.random.default_rng(0), 3, SHAPES, dtypes=(mx.float32,))
    mixed = mix(adapters, weights, rank)
    for path, shape in SHAPES.items():
        pairs = [(w, adapter.modules.get(path)) for w, adapter in zip(weights, adapters)]
        updates = [w * dense(lora) for w, lora in pairs if lora]
        expected = truncated(sum(updates), rank)
        got = dense(mixed.modules[path]) if path in mixed.modules else np.zeros(shape[::-1])
        assert_close(got, expected, max(1.0, np.linalg.norm(expected)))


def test_controls_mix_factors_apart_and_values_at_random():
    rng = np.random.default_rng(1)
    adapters = [Adapter(n, {P: lora_of(rng, SHAPES[P], 3, 0.5)}) for n in "xyz"]
    weights = [0.4, -1.2, 0.9]
    pairs = [[np.array(f, np.float64) for f in each.modules[P].factors()] for each in adapters]
    a, b = (sum(w * pair[k] for w, pair in zip(weights, pairs)) for k in (0, 1))
    assert_close(dense(mix_factors(adapters, weights).modules[P]), (a @ b).T, 1.0)
    large = Adapter("large", {P: lora_of(rng, (60, 50), 3, 0.5)})
    other = random_like(large, 1)
    old, new = dense(large.modules[P]), dense(other.modules[P])
    assert np.linalg.norm(new) == pytest.approx(np.linalg.norm(old), rel=1e-4)
    assert abs((old * new).sum()) < 0.1 * np.linalg.norm(old) ** 2


def test_the_nearest_tasks_share_the_weight():
    similarity = np.array([0.1, 0.9, 0.5, 0.7, -1.0])
    each = np.exp(np.array([0.9, 0.7, 0.5]) / 0.2)
    np.testing.assert_allclose(
        similarity_weights(similarity)[[1, 3, 2, 0, 4]], [*(each / each.sum()), 0, 0]
    )
    assert similarity_weights(np.array([-0.5])) == [1.0]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_continual_weights_are_those_of_merging_one_by_one(n):
    updates = np.random.default_rng(n).normal(size=(n, 4))
    merged = updates[0]
    for update in updates[1:]:
        merged = (merged + update) / 2
    if n > 1:
        np.testing.assert_allclose(continual_weights(n) @ updates, merged)
    assert continual_weights(n).sum() == pytest.approx(1)


def test_the_search_finds_a_planted_mix_and_counts_its_questions():
    planted, asked = np.array([1.0, 0.0, -0.5]), []

    def loss(weights):
        asked.append(weights.copy())
        return float(((weights - planted) ** 2).sum())

    found = search_weights(loss, 3, seed=0, evaluations=200)
    assert np.abs(found - planted).max() < 0.15
    assert len(asked) == 200 and not asked[0].any() and np.abs(asked).max() <= 1.5
    assert (search_weights(loss, 3, seed=0, evaluations=200) == found).all()
    # Where nothing is better than the base model, it stays at it.
    assert not search_weights(lambda weights: 1.0, 3).any()
