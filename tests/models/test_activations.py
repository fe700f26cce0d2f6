"""Exponentials on a CPU against mlx-lm's own."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

from d2c_mlx.models.kernels import attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["causal", "boolean", "additive", None])
def test_attention_is_mlx_lms_own(kv_heads, mask):
    rng = np.random.default_rng(0)
    shapes = (3, 4, 5, 8), (3, kv_heads, 7, 8), (3, kv_heads, 7, 8)
    q, k, v = (mx.array(rng.normal(size=shape) * 3).astype(mx.float32) for shape in shapes)
    seen = mx.arange(7) <= mx.arange(2, 7)[:, None]
    given = {"boolean": seen, "additive": mx.where(seen, 0.5, -mx.inf)}.get(mask, mask)
    stock = scaled_dot_product_attention(q, k, v, None, 0.3, given)
    assert mx.allclose(attention(q, k, v, None, 0.3, given), stock, atol=1e-5).item()
