"""Rows of numbers in a few bits each, and how to round them.

Codes, scales and biases are those of MLX's affine quantization, `value = scale * code + bias` per
group, so `mx.dequantize` reads them. `quantize.py` says what rounding is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import scipy.linalg

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "Levels",
    "Quantized",
    "columns",
    "mixing",
    "nearest",
    "ridge",
    "rounded",
    "values_of",
]

BITS, GROUP_SIZES = (16, 8, 4, 3, 2), (32, 64, 128)
# (number of components, bits), the leading components first: ((2, 4), (4, 2)) is two components
# at 4 bit and the next four at 2.
Levels = Sequence[tuple[int, int]]
# Shares of a group's range that are tried: clipping the rare large entries pays when codes are few
# (error of dW of a real adapter: 2 % less at 4 bit, 4 % at 3, 7 % at 2).
_SHRINK = {8: (1.0,), 4: (1.0, 0.9, 0.8), 3: (0.9, 0.75), 2: (0.9, 0.7)}


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rows of numbers in a few bits.

    Attributes:
        weight: uint32 `(rows, columns)`, codes packed from the lowest bit up; at 16 bits the
            numbers themselves, float16 `(rows, width)`.
        scales: float16 `(rows, groups)`; no groups at 16 bits.
        biases: float16 `(rows, groups)`.
        bits: one of `BITS`.
        group_size: numbers that share a scale and a bias.
        width: numbers in a row; the codes beyond, up to a whole group, are padding.
    """

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    group_size: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.weight.nbytes + self.scales.nbytes + self.biases.nbytes

    def scaled(self, factor: float) -> Quantized:
        """The numbers times a factor, as far as float16 holds them; the same codes."""
        names = ("weight",) if self.bits == 16 else ("scales", "biases")
        changed = {
            name: (getattr(self, name) * np.float32(factor)).astype(np.float16) for name in names
        }
        return replace(self, **changed)


def values_of(parts: Sequence[Quantized]) -> list[np.ndarray]:
    """The numbers of every part, float16 `(rows, width)`.

    Parts alike are computed in one call, a third faster than one by one. Computed in float32,
    where scale * code is exact, so every device rounds to the same bits.
    """
    alike: dict[tuple[int, int, int], list[int]] = {}
    for i, part in enumerate(parts):
        alike.setdefault((part.bits, part.group_size, part.width), []).append(i)
    values: dict[int, np.ndarray] = {}
    for (bits, group_size, width), members in alike.items():
        some = [parts[i] for i in members]
        rows = np.concatenate([part.weight for part in some])
        if bits != 16:
            scales, biases = (
                mx.array(np.concatenate([getattr(part, name) for part in some]).astype(np.float32))
                for name in ("scales", "biases")
            )
            numbers = mx.dequantize(mx.array(rows), scales, biases, group_size, bits)
            rows = np.array(numbers[:, :width].astype(mx.float16))
        cuts = np.cumsum([len(part.weight) for part in some])[:-1]
        values |= dict(zip(members, np.split(rows, cuts)))
    return [values[i] for i in range(len(parts))]


def columns(width: int, bits: int, group_size: int) -> tuple[int, int]:
    """`(columns of weight, groups)` of rows of `width` numbers."""
    if bits == 16:
        return width, 0
    groups = -(-width // group_size)
    return groups * group_size * bits // 32, groups


def ridge(gram: np.ndarray) -> np.ndarray:
    """Makes a Gram matrix regular where rounding left rows that are zero or equal."""
    return (1e-9 * np.trace(gram) + 1e-30) * np.eye(len(gram))


def mixing(sizes: Levels) -> np.ndarray:
    """Orthogonal, a block per level: the Hartley matrix, whose entries are nearly of one size."""
    blocks = []
    for n, bits in sizes:
        angle = 2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
        blocks.append(np.eye(n) if bits == 16 else (np.cos(angle) + np.sin(angle)) / np.sqrt(n))
    return scipy.linalg.block_diag(*blocks)


def _padded(rows: np.ndarray, group_size: int) -> np.ndarray:
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % group_size)]).astype(np.float32)


def _plain(rows: np.ndarray, group_size: int) -> Quantized:
    none = np.zeros((len(rows), 0), np.float16)
    return Quantized(rows.astype(np.float16), none, none, 16, group_size, rows.shape[1])


def nearest(rows: np.ndarray, sizes: Levels, group_size: int) -> list[Quantized]:
    """MLX's own rounding of every level; scales and biases are cut to float16 after it."""
    parts, start = [], 0
    for n, bits in sizes:
        some, start = rows[start : start + n], start + n
        if bits == 16:
            parts.append(_plain(some, group_size))
            continue
        found = mx.quantize(mx.array(_padded(some, group_size)), group_size, bits)
        weight, scales, biases = (np.array(x) for x in found)
        scales, biases = scales.astype(np.float16), biases.astype(np.float16)
        parts.append(Quantized(weight, scales, biases, bits, group_size, rows.shape[1]))
    return parts


def rounded(rows: np.ndarray, gram: np.ndarray, sizes: Levels, group_size: int) -> list[Quantized]:
    """Round row by row, the error of each carried to the rows before it, which come later.

    The last level has the fewest bits and comes first: finer rows can mend what it does.

    Args:
        rows: `(n, width)`, the exact minimum of the error.
        gram: `(n, n)` of the other factor's rows, the metric in which rows replace each other.
        sizes: levels, n components in all.
        group_size: one of `GROUP_SIZES`.
    """
    rows = rows.copy()
    gram = gram + ridge(gram)
    parts, stop = [], len(rows)
    for n, bits in reversed(sizes):
        codes = []
        for k in range(stop - 1, stop - n - 1, -1):
            if bits == 16:
                values = rows[k].astype(np.float16)
            else:
                *code, values = _fitted(rows[k], bits, group_size)
                codes.append(code)
            if k:
                carry = np.linalg.solve(gram[:k, :k], gram[:k, k])
                rows[:k] += np.outer(carry, rows[k] - values)
        if bits == 16:
            parts.append(_plain(rows[stop - n : stop], group_size))
        else:
            weight, scales, biases = (np.stack(x[::-1]) for x in zip(*codes))
            weight = _packed(weight, bits)
            parts.append(Quantized(weight, scales, biases, bits, group_size, rows.shape[1]))
        stop -= n
    return parts[::-1]


def _fitted(row: np.ndarray, bits: int, group_size: int) -> tuple[np.ndarray, ...]:
    """Round one row: each group takes the clipping, refitted or not, with the least error.

    Returns:
        Codes `(padded width,)`, scales and biases `(groups,)` in float16, and the float16 values
        `(width,)` that they stand for.
    """
    groups = _padded(row[None], group_size).reshape(-1, group_size)
    low, high = groups.min(axis=1), groups.max(axis=1)
    shares = np.array(_SHRINK[bits], np.float32)[:, None]
    cut = (1 - shares) / 2 * (high - low)
    first = _encode(groups, (high - low - 2 * cut) / (2**bits - 1), low + cut, bits)
    second = _encode(groups, *_refit(groups, first[0]), bits)
    codes, scales, biases, values = (np.concatenate(x) for x in zip(first, second))
    rest = groups - values
    best = np.einsum("cij,cij->ci", rest, rest).argmin(axis=0), np.arange(len(groups))
    values = values[best].astype(np.float16).reshape(-1)[: len(row)]
    return codes[best].astype(np.uint8).reshape(-1), scales[best], biases[best], values


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


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words of rows of codes, as one stream of bits from the lowest up."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<u4")
