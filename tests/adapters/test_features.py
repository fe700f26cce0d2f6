"""Similarity of adapters and their features for K-Means, against dense updates."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import closest_scale, errors_and_kept, similarity, svd_features
from d2c_mlx.cluster.partition import kmeans


def random_adapters(seed, n=5):
    """Mixed ranks, scales and dtypes, some modules missing; none is empty."""
    rng = np.random.default_rng(seed)
    shapes = {"model.layers.0.q": (6, 4), "model.layers.0.v": (3, 7), "model.layers.1.q": (1, 1)}
    adapters = []
    for i in range(n):
        modules = {}
        for j, (path, (width, out)) in enumerate(shapes.items()):
            if j != i % 3 and rng.random() < 0.4:
                continue
            r = int(rng.integers(1, 4))
            a, b = rng.normal(size=(width, r)), rng.normal(size=(r, out))
            dtype = [mx.float32, mx.float16][int(rng.integers(2))]
            modules[path] = LoRA(
                mx.array(a).astype(dtype), mx.array(b).astype(dtype), float(rng.uniform(0.1, 20))
            )
        adapters.append(Adapter(f"t{i}", modules))
    return adapters, shapes


def dense_updates(adapters, shapes):
    rows = []
    for adapter in adapters:
        flat = []
        for path, (width, out) in shapes.items():
            dense = np.zeros((width, out))
            if path in adapter.modules:
                lora = adapter.modules[path]
                a, b = (np.array(x.astype(mx.float32)).astype(np.float64) for x in (lora.a, lora.b))
                for r in range(a.shape[1]):
                    dense += lora.scale * np.outer(a[:, r], b[r])
            flat.append(dense.ravel())
        rows.append(np.concatenate(flat))
    return np.array(rows)


def dense_cosines(adapters, shapes):
    rows = dense_updates(adapters, shapes)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


@settings(max_examples=25)
@example(6100)  # components that cancel
@given(st.integers(0, 10_000))
def test_similarity_is_the_cosine_of_the_dense_updates(seed):
    adapters, shapes = random_adapters(seed)
    expected = dense_cosines(adapters, shapes)
    assert similarity(adapters) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("nbytes", [1, 1 << 9, 1 << 30])
def test_similarity_is_the_same_however_many_adapters_are_compared_at_once(nbytes, monkeypatch):
    monkeypatch.setattr("d2c_mlx.adapters.core_space._AT_ONCE", nbytes)
    adapters, shapes = random_adapters(3, n=9)
    np.testing.assert_allclose(
        similarity(adapters), dense_cosines(adapters, shapes), rtol=0, atol=1e-6
    )


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_the_closest_scale_is_least_squares_over_the_dense_updates(seed):
    (merged, *adapters), shapes = random_adapters(seed)
    one, *others = dense_updates([merged, *adapters], shapes)
    target = np.concatenate(others)
    (scale,), *_ = np.linalg.lstsq(np.tile(one, len(others))[:, None], target, rcond=None)
    assert closest_scale(merged, adapters) == pytest.approx(scale, rel=1e-5, abs=1e-6)


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_errors_of_dw_are_those_of_the_dense_updates(seed):
    (one, other, *_), shapes = random_adapters(seed)
    own, stored = ({path: dense_updates([x], {path: shapes[path]}) for path in shapes}
                   for x in (one, other))  # fmt: skip
    energy = {path: np.sum(own[path] ** 2) for path in one.modules}
    mean = np.mean(list(energy.values()))
    every = {**one.modules, **other.modules}
    errors = [np.sum((own[path] - stored[path]) ** 2) / energy.get(path, mean) for path in every]
    both = {path: np.sum(own[path] ** 2) * np.sum(stored[path] ** 2) for path in every}
    kept = [np.sum(own[path] * stored[path]) ** 2 / max(both[path], 1e-30) for path in every]
    expected = sum(errors) / len(energy), np.mean(kept)
    assert errors_and_kept(one, other) == pytest.approx(expected, rel=1e-5)
    assert errors_and_kept(one, None) == (1.0, 0.0)
    assert errors_and_kept(one, one) == pytest.approx((0.0, 1.0), abs=1e-9)


def test_a_merge_of_nothing_has_no_scale():
    zero = Adapter("zero", {"q": LoRA(mx.zeros((4, 2)), mx.zeros((2, 3)), 1.0)})
    one = Adapter("one", {"q": LoRA(mx.ones((4, 2)), mx.ones((2, 3)), 1.0)})
    other = Adapter("other", {"v": LoRA(mx.ones((4, 2)), mx.ones((2, 3)), 1.0)})
    assert closest_scale(zero, [one]) == 0
    assert closest_scale(one, [other]) == 0
    assert closest_scale(one, [one, other]) == 0.5


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_svd_features_keep_the_similarities(seed, n):
    adapters, shapes = random_adapters(seed, n)
    features = svd_features(similarity(adapters))
    assert np.linalg.norm(features, axis=1) == pytest.approx(np.ones(n))
    assert features @ features.T == pytest.approx(dense_cosines(adapters, shapes), abs=1e-5)


def test_svd_features_of_an_untrained_adapter():
    adapters, _ = random_adapters(0)
    zero = LoRA(mx.ones((6, 2)), mx.zeros((2, 4)))
    features = svd_features(similarity([*adapters, Adapter("zero", {"model.layers.0.q": zero})]))
    assert np.isfinite(features).all()
    kmeans(features, 2)
