"""The small range of float16: factors of a LoRA that fit it, their product unchanged."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["LARGEST", "balanced"]

# The largest number, and one below which float16 holds fewer bits than bfloat16 does.
LARGEST, _COARSE = 65504.0, 2.0**-17


def balanced(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """The same product in float32, within float16's range where a power of two can do it.

    Args:
        a: `(in, r)`.
        b: `(r, out)`.

    Returns:
        Both, lazily. Where a column of `a` or its row of `b` is out of the range, both get one
        size; others keep their bits.
    """
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    left, right = mx.abs(a).max(axis=0), mx.abs(b).max(axis=1)
    odd = ~(_in_range(left) & _in_range(right))
    # A component with a zero on one side is none, whatever is on the other.
    alive = (left > 0) & (right > 0)
    halfway = mx.round((mx.log2(right) - mx.log2(left)) / 2)
    shift = mx.where(alive & odd, mx.clip(halfway, -126, 126), 0).astype(mx.int32)
    gone = odd & ~alive
    a = mx.where(gone, 0, a * _power_of_two(shift))
    return a, mx.where(gone[:, None], 0, b * _power_of_two(-shift)[:, None])


def _in_range(sizes: mx.array) -> mx.array:
    return (sizes == 0) | ((sizes >= _COARSE) & (sizes <= LARGEST))


def _power_of_two(exponents: mx.array) -> mx.array:
    """Exact, as no device's `power` need be: the bits of a float32."""
    return mx.left_shift(exponents + 127, mx.array(23)).view(mx.float32)
