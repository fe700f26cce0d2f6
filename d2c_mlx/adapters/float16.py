"""The small range of float16, and how the factors of a LoRA are made to fit it."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["FLOAT16_MAX", "balance_factors"]

FLOAT16_MAX = 65504.0
# Below it float16 holds fewer bits than bfloat16 does.
_COARSE = 2.0**-17


def balance_factors(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Bring factors into float16's range where powers of two can do it, their product unchanged.

    Call it before a cast to float16; `Adapter.uniform` does.

    Args:
        a: `(in, r)`.
        b: `(r, out)`.

    Returns:
        `a` and `b` in float32, not yet evaluated. Where a column of `a` or its row of `b` is out of
        the range, both get one size; all others keep their bits.
    """
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    left, right = mx.abs(a).max(axis=0), mx.abs(b).max(axis=1)
    out_of_range = ~(_in_range(left) & _in_range(right))
    # A component with a zero on one side is none, whatever is on the other.
    alive = (left > 0) & (right > 0)
    halfway = mx.round((mx.log2(right) - mx.log2(left)) / 2)
    shift = mx.where(alive & out_of_range, mx.clip(halfway, -126, 126), 0).astype(mx.int32)
    gone = out_of_range & ~alive
    a = mx.where(gone, 0, a * _power_of_two(shift))
    return a, mx.where(gone[:, None], 0, b * _power_of_two(-shift)[:, None])


def _in_range(sizes: mx.array) -> mx.array:
    return (sizes == 0) | ((sizes >= _COARSE) & (sizes <= FLOAT16_MAX))


def _power_of_two(exponents: mx.array) -> mx.array:
    """2 ** exponents from the bits of a float32: exact, which no device's `power` need be."""
    return mx.left_shift(exponents + 127, mx.array(23)).view(mx.float32)
