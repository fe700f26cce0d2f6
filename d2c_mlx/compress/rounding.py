"""Rounding rows of numbers to codes of a few bits: to the nearest, or with less error by GPTQ.

GPTQ rounds rows one by one, with error compensation by the rows that are left; groups are clipped
besides, which GPTQ itself does not do. `quantize.py` prepares the rows.

Source: https://arxiv.org/abs/2210.17323.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from d2c_mlx.compress.compressed import Levels, Quantized
from d2c_mlx.evaluate.batches import indices_by_key

__all__ = ["GPTQResult", "gptq_round", "hartley_rotation", "ridge", "round_to_nearest"]

# One module's quantized levels, and the float64 numbers `(n, width)` that they stand for.
GPTQResult = tuple[list[Quantized], np.ndarray]

# Shares of a group's range to try. Clipping the rare large entries pays when codes are few (error
# of dW of a real adapter: 2 % less at 4 bit, 4 % at 3, 7 % at 2).
_SHRINK = {8: (1.0,), 4: (1.0, 0.9, 0.8), 3: (0.9, 0.75), 2: (0.9, 0.7)}


def round_to_nearest(
    rows: Sequence[np.ndarray], levels: Sequence[Levels], group_size: int
) -> list[list[Quantized]]:
    """Round many modules with MLX's own `quantize`; scales and biases become float16 after it.

    The fastest rounding; `gptq_round` takes longer and leaves less error.

    Args:
        rows: `(n, width)` of every module.
        levels: bit allocation of every module, n components in all.
        group_size: one of `GROUP_SIZES`.

    Returns:
        For every module one `Quantized` per level.
    """
    parts, bits_of, names = [], [], ("weight", "scales", "biases")
    for module, given in zip(rows, levels):
        parts += np.split(module, np.cumsum([n for n, _ in given])[:-1])
        bits_of += [bits for _, bits in given]
    rounded: dict[int, Quantized] = {}
    kinds = indices_by_key((bits, part.shape[1]) for part, bits in zip(parts, bits_of))
    for (bits, width), members in kinds.items():
        same = np.concatenate([parts[i] for i in members])
        if bits == 16:
            whole = _as_float16(same, group_size)
        else:
            codes = mx.quantize(mx.array(_pad_to_groups(same, group_size)), group_size, bits)
            weight, scales, biases = (np.array(x) for x in codes)
            scales, biases = scales.astype(np.float16), biases.astype(np.float16)
            whole = Quantized(weight, scales, biases, bits, group_size, width)
        stop = 0
        for i in members:
            start, stop = stop, stop + len(parts[i])
            rows_of = {name: getattr(whole, name)[start:stop] for name in names}
            rounded[i] = replace(whole, **rows_of)
    each = iter(range(len(parts)))
    return [[rounded[next(each)] for _ in given] for given in levels]


def hartley_rotation(levels: Levels) -> np.ndarray:
    """`(n, n)` orthogonal matrix that mixes the components within each level.

    Each block is a Hartley matrix, whose entries are all of about one size, so after it the rows of
    a level have one size too; components at 16 bits are left alone.
    """
    from scipy.linalg import block_diag

    blocks = []
    for n, bits in levels:
        angle = 2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
        blocks.append(np.eye(n) if bits == 16 else (np.cos(angle) + np.sin(angle)) / np.sqrt(n))
    return block_diag(*blocks)


def ridge(gram: np.ndarray) -> np.ndarray:
    """The matrix that makes a Gram matrix regular where rounding left zero or equal rows."""
    return (1e-9 * np.trace(gram) + 1e-30) * np.eye(len(gram))


def gptq_round(
    rows: Sequence[np.ndarray],
    grams: Sequence[np.ndarray],
    levels: Sequence[Levels],
    group_size: int,
    symmetric: bool = False,
) -> list[GPTQResult]:
    """Round the rows of many modules, each row's error compensated by those not yet rounded.

    Use it for rows that overlap (after `hartley_rotation`, say): orthogonal rows cannot compensate
    each other, and then `round_to_nearest` is as good and faster.

    Args:
        rows: `(n, width)` of every module, the exact minimum of the error.
        grams: `(n, n)` Gram matrix of the other factor's rows, the metric in which rows replace
            each other.
        levels: bit allocation of every module, n components in all.
        group_size: one of `GROUP_SIZES`.
        symmetric: every bias is -2**(bits - 1) times its scale, as in GGUF's Q4_0 and Q8_0.

    Returns:
        For every module its levels, and the numbers that they stand for.

    Source: https://arxiv.org/abs/2210.17323.
    """
    rounded: dict[int, GPTQResult] = {}
    # Modules of one width are rounded together: one by one they take three times as long.
    for members in indices_by_key(module.shape[1] for module in rows).values():
        # The most rows first, so that the modules still active at a step are the first ones.
        members.sort(key=lambda i: -len(rows[i]))
        modules = [(rows[i], grams[i], levels[i]) for i in members]
        rounded |= dict(zip(members, _round_same_width(modules, group_size, symmetric)))
    return [rounded[i] for i in range(len(rows))]


def _round_same_width(
    modules: Sequence[tuple[np.ndarray, np.ndarray, Levels]], group_size: int, symmetric: bool
) -> list[GPTQResult]:
    """`gptq_round` of modules of one width: rows, Gram matrix and levels, the most rows first."""
    # Step k rounds the k-th row from each module's end. The last level has the fewest bits, so its
    # errors come first and finer rows compensate them.
    m, (n, width) = len(modules), modules[0][0].shape
    groups = -(-width // group_size)
    left, metric = np.zeros((m, n, width)), np.tile(np.eye(n), (m, 1, 1))
    bits = np.zeros((m, n), int)
    for i, (rows, gram, levels) in enumerate(modules):
        last = len(rows)
        left[i, :last], metric[i, :last, :last] = rows[::-1], (gram + ridge(gram))[::-1, ::-1]
        bits[i, :last] = np.repeat([b for _, b in levels], [count for count, _ in levels])[::-1]
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
                fitted = _fit_codes(now[at], b, group_size, symmetric)
                codes[at, k], scales[at, k], biases[at, k], values[at, k] = fitted
        if k + 1 < n:
            later = metric[:active, k + 1 :]
            carry = np.linalg.solve(later[:, :, k + 1 :], later[:, :, k : k + 1])
            left[:active, k + 1 :] += carry * (now - values[:active, k])[:, None]
    results = []
    for i, (_, _, levels) in enumerate(modules):
        parts, stop = [], sum(count for count, _ in levels)
        numbers = values[i, stop - 1 :: -1] if stop else values[i, :0]
        for count, b in levels:  # Row `stop - 1` is the first that is left, as they are reversed.
            start, stop = stop, stop - count
            kept = slice(start - 1, stop - 1 if stop else None, -1)
            if b == 16:
                parts.append(_as_float16(values[i, kept], group_size))
            else:
                # `mx.quantize` packs only codes that it chose itself: the lowest bit first.
                bytes_of = np.ascontiguousarray(codes[i, kept])[..., None]
                stream = np.unpackbits(bytes_of, axis=-1, count=b, bitorder="little")
                stream = stream.reshape(len(bytes_of), -1)
                weight = np.packbits(stream, axis=1, bitorder="little").view("<u4")
                stored = weight, scales[i, kept], biases[i, kept]
                parts.append(Quantized(*stored, b, group_size, width))
        results.append((parts, numbers.astype(np.float64)))
    return results


def _fit_codes(
    rows: np.ndarray, bits: int, group_size: int, symmetric: bool
) -> tuple[np.ndarray, ...]:
    """Round rows to nearest; each group takes the clipping with the least error, refitted or not.

    Returns:
        Codes `(rows, padded width)`, scales and biases `(rows, groups)` in float16, and the
        float16 values `(rows, width)` that they stand for.
    """
    n, width = rows.shape
    groups = _pad_to_groups(rows, group_size).reshape(-1, group_size)
    shares = np.array(_SHRINK[bits], np.float32)[:, None]
    if symmetric:
        # The largest number gets code 0: that side has one code more.
        largest = np.abs(groups).argmax(axis=1)[:, None]
        peaks = np.take_along_axis(groups, largest, axis=1)[:, 0]
        first = _encode(groups, shares * peaks / -(2 ** (bits - 1)), None, bits)
        centred = first[0] - np.float32(2 ** (bits - 1))
        second = _encode(groups, _slope(centred, groups), None, bits)
    else:
        low, high = groups.min(axis=1), groups.max(axis=1)
        cut = (1 - shares) / 2 * (high - low)
        first = _encode(groups, (high - low - 2 * cut) / (2**bits - 1), low + cut, bits)
        # Scales and biases by least squares, the codes given.
        mean = first[0].mean(axis=-1)
        scale = _slope(first[0] - mean[..., None], groups)
        second = _encode(groups, scale, groups.mean(axis=-1) - scale * mean, bits)
    codes, scales, biases, values = (np.concatenate(x) for x in zip(first, second))
    rest = groups - values
    best = np.einsum("cij,cij->ci", rest, rest).argmin(axis=0), np.arange(len(groups))
    *code, values = (x[best].reshape(n, -1) for x in (codes, scales, biases, values))
    return *code, values[:, :width]


def _encode(
    groups: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes for scales and biases as stored, of several candidates `(c, groups)`.

    Without biases they are those of symmetric codes.

    Returns:
        Codes `(c, groups, group_size)`, scales and biases in float16, values like codes.
    """
    scale = scale.astype(np.float16)
    bias = scale * np.float16(-(2 ** (bits - 1))) if bias is None else bias.astype(np.float16)
    wide, offset = scale.astype(np.float32)[..., None], bias.astype(np.float32)[..., None]
    codes = (groups - offset) / np.where(wide == 0, 1, wide)
    codes = np.clip(np.rint(codes, out=codes), 0, 2**bits - 1, out=codes)
    return codes, scale, bias, codes * wide + offset


def _slope(centred: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The factor `(c, groups)` of centred codes that is closest to the numbers."""
    spread = np.einsum("cij,cij->ci", centred, centred)
    return np.einsum("cij,ij->ci", centred, groups) / np.where(spread == 0, 1, spread)


def _as_float16(rows: np.ndarray, group_size: int) -> Quantized:
    """Rows at 16 bits, which have no groups; `group_size` is kept for the file's index."""
    none = np.zeros((len(rows), 0), np.float16)
    return Quantized(rows.astype(np.float16), none, none, 16, group_size, rows.shape[1])


def _pad_to_groups(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Rows in float32, padded with zeros at the end to whole groups."""
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % group_size)]).astype(np.float32)
