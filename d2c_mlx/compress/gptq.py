"""Rounding rows one by one, the error of each made good by the rows that are left.

Source: GPTQ (https://arxiv.org/abs/2210.17323), with clipping. `quantize.py` says what it is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2c_mlx.compress.affine import Levels, Quantized, packed, padded, plain
from d2c_mlx.utils.grouping import alike

__all__ = ["Rounded", "ridge", "rounded"]

# A module's levels, and the numbers `(n, width)` that they stand for, float64.
Rounded = tuple[list[Quantized], np.ndarray]

# Shares of a group's range that are tried: clipping the rare large entries pays when codes are few
# (error of dW of a real adapter: 2 % less at 4 bit, 4 % at 3, 7 % at 2).
_SHRINK = {8: (1.0,), 4: (1.0, 0.9, 0.8), 3: (0.9, 0.75), 2: (0.9, 0.7)}


def ridge(gram: np.ndarray) -> np.ndarray:
    """Makes a Gram matrix regular where rounding left rows that are zero or equal."""
    return (1e-9 * np.trace(gram) + 1e-30) * np.eye(len(gram))


def rounded(
    rows: Sequence[np.ndarray],
    grams: Sequence[np.ndarray],
    sizes: Sequence[Levels],
    group_size: int,
) -> list[Rounded]:
    """Round row by row, the error of each carried to the rows before it, which come later.

    The last level has the fewest bits and comes first: finer rows can mend what it does. Modules
    of one width go together, the last row of each first: one by one they take three times as long.

    Args:
        rows: of every module, `(n, width)`, the exact minimum of the error.
        grams: `(n, n)` of the other factor's rows, the metric in which rows replace each other.
        sizes: levels of every module, n components in all.
        group_size: one of `GROUP_SIZES`.
    """
    found: dict[int, Rounded] = {}
    for members in alike(one.shape[1] for one in rows).values():
        # The most rows first: those that are left at a step are the first ones.
        members.sort(key=lambda i: -len(rows[i]))
        some = [(rows[i], grams[i], sizes[i]) for i in members]
        found |= dict(zip(members, _rounded_alike(some, group_size)))
    return [found[i] for i in range(len(rows))]


def _rounded_alike(
    modules: Sequence[tuple[np.ndarray, np.ndarray, Levels]], group_size: int
) -> list[Rounded]:
    """`rounded` for rows, Gram matrices and levels of modules of one width, the most rows first."""
    # Step k is the k-th row from each one's end.
    m, (n, width) = len(modules), modules[0][0].shape
    groups = -(-width // group_size)
    left, metric = np.zeros((m, n, width)), np.tile(np.eye(n), (m, 1, 1))
    bits = np.zeros((m, n), int)
    for i, (rows, gram, sizes) in enumerate(modules):
        last = len(rows)
        left[i, :last], metric[i, :last, :last] = rows[::-1], (gram + ridge(gram))[::-1, ::-1]
        bits[i, :last] = np.repeat([b for _, b in sizes], [count for count, _ in sizes])[::-1]
    codes = np.zeros((m, n, groups * group_size), np.uint8)
    scales, biases = (np.zeros((m, n, groups), np.float16) for _ in range(2))
    values = np.zeros((m, n, width), np.float16)
    for k in range(n):
        active = np.count_nonzero(bits[:, k])
        now = left[:active, k]
        for b in map(int, np.unique(bits[:active, k])):
            at = np.flatnonzero(bits[:active, k] == b)
            if b == 16:
                values[at, k] = now[at]
            else:
                fitted = _fitted(now[at], b, group_size)
                codes[at, k], scales[at, k], biases[at, k], values[at, k] = fitted
        if k + 1 < n:
            later = metric[:active, k + 1 :]
            carry = np.linalg.solve(later[:, :, k + 1 :], later[:, :, k : k + 1])
            left[:active, k + 1 :] += carry * (now - values[:active, k])[:, None]
    found = []
    for i, (rows, _, sizes) in enumerate(modules):
        mine = [x[i, len(rows) - 1 :: -1] for x in (values, codes, scales, biases)]
        found.append((_levels(mine, sizes, group_size), mine[0].astype(np.float64)))
    return found


def _levels(stored: Sequence[np.ndarray], sizes: Levels, group_size: int) -> list[Quantized]:
    """One module's levels, of its rows' numbers, codes, scales and biases."""
    parts, stop = [], 0
    for n, bits in sizes:
        start, stop = stop, stop + n
        rows, codes, scales, biases = (x[start:stop] for x in stored)
        if bits == 16:
            parts.append(plain(rows, group_size))
        else:
            weight = packed(np.ascontiguousarray(codes), bits)
            parts.append(Quantized(weight, scales, biases, bits, group_size, rows.shape[1]))
    return parts


def _fitted(rows: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, ...]:
    """Round rows: each group takes the clipping, refitted or not, with the least error.

    Returns:
        Codes `(rows, padded width)`, scales and biases `(rows, groups)` in float16, and the
        float16 values `(rows, width)` that they stand for.
    """
    n, width = rows.shape
    groups = padded(rows, group_size).reshape(-1, group_size)
    low, high = groups.min(axis=1), groups.max(axis=1)
    shares = np.array(_SHRINK[bits], np.float32)[:, None]
    cut = (1 - shares) / 2 * (high - low)
    first = _encode(groups, (high - low - 2 * cut) / (2**bits - 1), low + cut, bits)
    second = _encode(groups, *_refit(groups, first[0]), bits)
    codes, scales, biases, values = (np.concatenate(x) for x in zip(first, second))
    rest = groups - values
    best = np.einsum("cij,cij->ci", rest, rest).argmin(axis=0), np.arange(len(groups))
    *code, values = (x[best].reshape(n, -1) for x in (codes, scales, biases, values))
    return *code, values[:, :width]


def _encode(
    groups: np.ndarray, scale: np.ndarray, bias: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes for scales and biases as stored, of several candidates `(c, groups)`.

    Returns:
        Codes `(c, groups, group_size)`, scales and biases in float16, values like codes.
    """
    scale, bias = scale.astype(np.float16), bias.astype(np.float16)
    wide, offset = scale.astype(np.float32)[..., None], bias.astype(np.float32)[..., None]
    codes = (groups - offset) / np.where(wide == 0, 1, wide)
    codes = np.clip(np.rint(codes, out=codes), 0, 2**bits - 1, out=codes)
    return codes, scale, bias, codes * wide + offset


def _refit(groups: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases `(c, groups)` by least squares, the codes given."""
    mean = codes.mean(axis=-1)
    centred = codes - mean[..., None]
    spread = np.einsum("cij,cij->ci", centred, centred)
    scale = np.einsum("cij,ij->ci", centred, groups) / np.where(spread == 0, 1, spread)
    return scale, groups.mean(axis=-1) - scale * mean
