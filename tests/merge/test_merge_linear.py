"""The mean of dW against a dense one: truncation, odd shapes, missing modules, layout."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import (
    NUMERIC,
    P,
    Q,
    R,
    adapters_of,
    assert_close,
    dense,
    dense_mean,
    dims,
    lora_of,
    truncated,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.merge.methods import merge_adapters


@settings(NUMERIC, max_examples=40)
@given(st.tuples(dims, dims), st.tuples(dims, dims), st.integers(2, 5), st.integers(0, 10_000))
def test_linear_without_truncation_is_the_dense_mean(one, two, n, seed):
    shapes = {P: one, Q: two, R: (1, 1)}
    adapters = adapters_of(np.random.default_rng(seed), n, shapes)
    merged = merge_adapters(adapters, rank=sum(adapter.rank for adapter in adapters))
    assert set(merged.modules) == {path for adapter in adapters for path in adapter.modules}
    for path, lora in merged.modules.items():
        expected = dense_mean(adapters, path, shapes[path])
        size = max(np.linalg.norm(dense(a.modules[path])) for a in adapters if path in a.modules)
        assert lora.shape == shapes[path]
        assert_close(dense(lora), expected, size, 1e-5)


@settings(NUMERIC, max_examples=40)
@given(st.tuples(dims, dims), st.integers(2, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_linear_truncates_like_the_dense_svd(shape, n, rank, seed):
    shapes = {P: shape, Q: (7, 3)}
    adapters = adapters_of(np.random.default_rng(seed), n, shapes)
    merged = merge_adapters(adapters, rank=rank)
    for path, lora in merged.modules.items():
        mean = dense_mean(adapters, path, shapes[path])
        assert lora.rank <= rank
        # Near-equal singular values make the truncation itself arbitrary, its error never.
        error = np.linalg.norm(dense(lora) - mean)
        s = np.linalg.svd(mean, compute_uv=False)
        best = np.linalg.norm(s[rank:])
        assert error <= best + 1e-4 * np.linalg.norm(mean) + 1e-6
        if rank < len(s) and s[rank - 1] > 1.2 * s[rank] + 1e-6:
            assert_close(dense(lora), truncated(mean, rank), np.linalg.norm(s), 1e-4)


def test_default_rank_is_the_largest_of_the_inputs():
    rng = np.random.default_rng(0)
    one = Adapter("a", {P: lora_of(rng, (20, 30), 2), Q: lora_of(rng, (20, 30), 5)})
    two = Adapter("b", {P: lora_of(rng, (20, 30), 3)})
    merged = merge_adapters([one, two])
    # Q has no more than 5 directions; P could use all 5 of the largest rank, and does.
    assert {path: lora.rank for path, lora in merged.modules.items()} == {P: 5, Q: 5}
    assert_close(dense(merged.modules[P]), dense_mean([one, two], P, (20, 30)), 1.0)


def test_result_names_and_layout():
    rng = np.random.default_rng(0)
    adapters = [
        Adapter(name, {P: lora_of(rng, (6, 5), 2, 3.0, mx.float16)}, "base") for name in ("b", "a")
    ]
    merged = merge_adapters(adapters)
    assert (merged.name, merged.sources, merged.base) == ("a+b", ("a", "b"), "base")
    lora = merged.modules[P]
    assert (lora.a.dtype, lora.b.dtype, lora.scale) == (mx.float32, mx.float32, 1.0)
    # Singular values are split evenly: both factors have the same norms, direction by direction.
    a, b = np.array(lora.a), np.array(lora.b)
    assert np.linalg.norm(a, axis=0) == pytest.approx(np.linalg.norm(b, axis=1), rel=1e-4)
    assert [adapter.name for adapter in adapters] == ["b", "a"]
