"""Grams, cosines and features from factors against dense dW; tests/merge has the core space."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import P, Q, R, adapters_of, assert_close, dense, lora_of, numeric, seeds
from hypothesis import example
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import (
    closest_scale,
    errors_and_kept,
    similarity,
    svd_features,
)
from d2c_mlx.merge.methods import scaled


def test_scaled():
    adapter = Adapter("a", {P: lora_of(np.random.default_rng(0), (6, 5), 2, 3.0)}, "base", ("x",))
    half = scaled(adapter, 0.5)
    assert_close(dense(half.modules[P]), dense(adapter.modules[P]) / 2, 1.0, 1e-6)
    assert (half.name, half.base, half.sources) == ("a", "base", ("x",))
    # Factors in 16 bit whose product is beyond it.
    large = mx.full((2, 1), 4e4, mx.float16)
    b = scaled(Adapter("a", {P: LoRA(large, large.T, 2.0)}), 4.0).modules[P].b
    assert np.array(b) == pytest.approx(np.full((1, 2), 3.2e5), rel=1e-3)


SHAPES = {P: (6, 4), Q: (3, 7), R: (1, 1)}


def random_adapters(seed, n=5):
    """Mixed ranks, scales and dtypes, some modules missing; none is empty."""
    return adapters_of(np.random.default_rng(seed), n, SHAPES, 3)


def dense_updates(adapters, paths=SHAPES):
    zeros = {path: np.zeros(SHAPES[path][::-1]) for path in SHAPES}
    rows = [{**zeros, **{path: dense(lora) for path, lora in adapter.modules.items()}}
            for adapter in adapters]  # fmt: skip
    return np.array([np.concatenate([row[path].ravel() for path in paths]) for row in rows])


@numeric(seeds, st.integers(1, 6))
@example(6100, 5)  # components that cancel
def test_similarities_and_features_are_those_of_the_dense_updates(seed, n):
    adapters = random_adapters(seed, n)
    rows = dense_updates(adapters)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = rows @ rows.T
    # However many are compared at once.
    for nbytes in (1, 1 << 9, 1 << 25):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("d2c_mlx.adapters.core_space._AT_ONCE", nbytes)
            assert similarity(adapters) == pytest.approx(expected, abs=2e-6)
    features = svd_features(similarity(adapters))
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(n))
    assert features @ features.T == pytest.approx(expected, abs=1e-5)
    # One that was never trained has no direction.
    zero = Adapter("zero", {P: LoRA(mx.ones((6, 2)), mx.zeros((2, 4)))})
    assert np.isfinite(svd_features(similarity([*adapters, zero]))).all()


@numeric(seeds)
def test_the_closest_scale_is_least_squares_over_the_dense_updates(seed):
    merged, *adapters = random_adapters(seed)
    update, *others = dense_updates([merged, *adapters])
    target = np.concatenate(others)
    (scale,), *_ = np.linalg.lstsq(np.tile(update, len(others))[:, None], target, rcond=None)
    assert closest_scale(merged, adapters) == pytest.approx(scale, rel=1e-5, abs=1e-6)


@numeric(seeds)
def test_errors_of_dw_are_those_of_the_dense_updates(seed):
    adapter, other, *_ = random_adapters(seed)
    own, stored = ({path: dense_updates([x], [path]) for path in SHAPES} for x in (adapter, other))
    energy = {path: np.sum(own[path] ** 2) for path in adapter.modules}
    mean = np.mean(list(energy.values()))
    every = {**adapter.modules, **other.modules}
    errors = [np.sum((own[path] - stored[path]) ** 2) / energy.get(path, mean) for path in every]
    both = {path: np.sum(own[path] ** 2) * np.sum(stored[path] ** 2) for path in every}
    kept = [np.sum(own[path] * stored[path]) ** 2 / max(both[path], 1e-30) for path in every]
    expected = sum(errors) / len(energy), np.mean(kept)
    assert errors_and_kept(adapter, other) == pytest.approx(expected, rel=1e-5)
    assert errors_and_kept(adapter, None) == (1.0, 0.0)
    assert errors_and_kept(adapter, adapter) == pytest.approx((0.0, 1.0), abs=1e-9)


def test_a_merge_of_nothing_has_no_scale():
    zero = Adapter("zero", {"q": LoRA(mx.zeros((4, 2)), mx.zeros((2, 3)), 1.0)})
    adapter = Adapter("one", {"q": LoRA(mx.ones((4, 2)), mx.ones((2, 3)), 1.0)})
    other = Adapter("other", {"v": LoRA(mx.ones((4, 2)), mx.ones((2, 3)), 1.0)})
    assert closest_scale(zero, [adapter]) == 0
    assert closest_scale(adapter, [other]) == 0
    assert closest_scale(adapter, [adapter, other]) == 0.5
