"""The small space in which all of a module's updates are merged, and the scale of a merge."""

import mlx.core as mx
import numpy as np
import pytest
from helpers.loras import NUMERIC, P, Q, assert_close, dense, dims, lora_of
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.adapters.core_space import to_core
from d2c_mlx.merge.methods import scaled


@settings(NUMERIC, max_examples=30)
@given(
    st.tuples(dims, dims), st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99)
)
def test_core_space_is_lossless(shape, ranks, seed):
    rng = np.random.default_rng(seed)
    factors = [lora_of(rng, shape, rank).factors() for rank in ranks]
    space = to_core(factors)
    q_a, q_b, cores = space.q_a, space.q_b, space.updates
    assert len(cores) == len(ranks)
    weights = rng.normal(size=len(ranks))
    assert space.weighted_sum(weights) == pytest.approx(np.tensordot(weights, cores, 1), abs=1e-4)
    assert q_a.shape[1] <= sum(ranks) and q_b.shape[1] <= sum(ranks)
    assert q_a.T @ q_a == pytest.approx(np.eye(q_a.shape[1]), abs=1e-5)
    for (a, b), core in zip(factors, cores):
        assert q_b @ core @ q_a.T == pytest.approx((a @ b).T, abs=1e-4)


@pytest.mark.parametrize("scales", [(3.0, 3.0), (3.0, 0.7)], ids=["one scale", "two"])
def test_one_rank_and_scale_change_no_bit_but_where_scales_are_folded(scales):
    """And all factors have one dtype, as mlx-swift wants it."""
    rng = np.random.default_rng(0)
    first, second = (lora_of(rng, (6, 5), r, scale, mx.float16) for r, scale in zip((2, 3), scales))
    modules = Adapter("a", {P: first, Q: second}).uniform().modules
    assert {lora.rank for lora in modules.values()} == {3}
    assert len({x.dtype for lora in modules.values() for x in (lora.a, lora.b)}) == 1
    for lora, was in ((modules[P], first), (modules[Q], second)):
        assert np.array_equal(np.array(lora.a)[:, : was.rank], np.array(was.a))
        kept = np.array(lora.b)[: was.rank]
        if scales[0] == scales[1]:
            assert np.array_equal(kept, np.array(was.b)) and lora.scale == was.scale
        assert_close(dense(lora), dense(was), 1.0, 1e-6)


def test_scaled():
    adapter = Adapter("a", {P: lora_of(np.random.default_rng(0), (6, 5), 2, 3.0)}, "base", ("x",))
    half = scaled(adapter, 0.5)
    assert_close(dense(half.modules[P]), dense(adapter.modules[P]) / 2, 1.0, 1e-6)
    assert (half.name, half.base, half.sources) == ("a", "base", ("x",))
    # Factors in 16 bit whose product is beyond it.
    large = mx.full((2, 1), 4e4, mx.float16)
    b = scaled(Adapter("a", {P: LoRA(large, large.T, 2.0)}), 4.0).modules[P].b
    assert np.array(b) == pytest.approx(np.full((1, 2), 3.2e5), rel=1e-3)
