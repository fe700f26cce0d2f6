"""Merges of the factors themselves: exact concatenation, and PEFT's sums of A and of B."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.adapters.core_space import Factors

__all__ = ["concat", "factor_linear"]


def concat(factors: Sequence[Factors], weights: np.ndarray) -> Factors:
    """Add the updates up exactly, by putting the factors side by side.

    The rank is the sum of the ranks. Use it where there is room for that; `linear` truncates the
    same sum.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`.
        weights: `(T,)`; 1 / T makes it the mean.

    Returns:
        `a (in, R)`, a bit-for-bit copy of the columns, and `b (R, out)`, weighted; R is the sum of
        the r_i.

    Source: PEFT's `combination_type="cat"`, https://huggingface.co/docs/peft; stacking in FLoRA,
    https://arxiv.org/abs/2409.05976.
    """
    a = np.concatenate([a for a, _ in factors], axis=1)
    weighted = [b * b.dtype.type(weight) for weight, (_, b) in zip(weights, factors)]
    return a, np.concatenate(weighted)


def factor_linear(
    factors: Sequence[Factors], weights: np.ndarray, scales: Sequence[float]
) -> Factors:
    """Add up A and B apart, as PEFT's `linear` does, so that cross terms B_i A_j appear.

    Use it only to compare with PEFT; `linear` adds up dW. Each factor takes the square root of
    |weight * scale|, and `a` the sign. The result depends on how a dW is factored, and T equal
    adapters give T times the adapter (weights 1 / T). PEFT refuses different ranks; here the
    smaller ones are padded with zeros.

    Args:
        factors: T pairs `a (in, r_i)`, `b (r_i, out)`, scales folded into b.
        weights: `(T,)`.
        scales: the T scales that were folded into each b; PEFT splits them between the factors.

    Returns:
        `a (in, r)`, `b (r, out)`, r the largest r_i.

    Source: PEFT's `combination_type="linear"`, https://huggingface.co/docs/peft; sums of A and of B
    in LoraHub, https://arxiv.org/abs/2307.13269.
    """
    (width, _), (_, out) = factors[0][0].shape, factors[0][1].shape
    rank = max(len(b) for _, b in factors)
    a_sum, b_sum = np.zeros((width, rank), np.float32), np.zeros((rank, out), np.float32)
    for (a, b), weight, scale in zip(factors, weights, scales):
        if weight * scale:
            root = np.sqrt(abs(weight * scale))
            a_sum[:, : len(b)] += np.float32(np.sign(weight * scale) * root) * a
            b_sum[: len(b)] += np.float32(root / scale) * b
    return a_sum, b_sum
