"""Rows of numbers in a few bits each, and the nearest codes for them.

Codes, scales and biases are those of MLX's affine quantization, `value = scale * code + bias` per
group, so `mx.dequantize` reads them. `gptq.py` rounds better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import scipy.linalg

from d2c_mlx.utils.grouping import alike

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "Levels",
    "Quantized",
    "columns",
    "mixing",
    "nearest",
    "packed",
    "padded",
    "plain",
    "values_of",
]

BITS, GROUP_SIZES = (16, 8, 4, 3, 2), (32, 64, 128)
# (number of components, bits), the leading components first: ((2, 4), (4, 2)) is two components
# at 4 bit and the next four at 2.
Levels = Sequence[tuple[int, int]]


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

    def cut(self, start: int, stop: int) -> Quantized:
        """Some of the rows."""
        names = ("weight", "scales", "biases")
        return replace(self, **{name: getattr(self, name)[start:stop] for name in names})

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
    kinds = alike((part.bits, part.group_size, part.width) for part in parts)
    values: dict[int, np.ndarray] = {}
    for (bits, group_size, width), members in kinds.items():
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


def mixing(sizes: Levels) -> np.ndarray:
    """Orthogonal, a block per level: the Hartley matrix, whose entries are nearly of one size."""
    blocks = []
    for n, bits in sizes:
        angle = 2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
        blocks.append(np.eye(n) if bits == 16 else (np.cos(angle) + np.sin(angle)) / np.sqrt(n))
    return scipy.linalg.block_diag(*blocks)


def padded(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Float32 rows of whole groups, zeros at the end."""
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % group_size)]).astype(np.float32)


def plain(rows: np.ndarray, group_size: int) -> Quantized:
    """Rows at 16 bits."""
    none = np.zeros((len(rows), 0), np.float16)
    return Quantized(rows.astype(np.float16), none, none, 16, group_size, rows.shape[1])


def nearest(
    rows: Sequence[np.ndarray], sizes: Sequence[Levels], group_size: int
) -> list[list[Quantized]]:
    """MLX's own rounding of every level; scales and biases are cut to float16 after it.

    Args:
        rows: of every module, `(n, width)`.
        sizes: levels of every module, n components in all.
        group_size: one of `GROUP_SIZES`.
    """
    parts = [(part, bits) for pair in zip(rows, sizes) for part, bits in _by_level(*pair)]
    found: dict[int, Quantized] = {}
    for (bits, width), members in alike((bits, part.shape[1]) for part, bits in parts).items():
        some = np.concatenate([parts[i][0] for i in members])
        if bits == 16:
            whole = plain(some, group_size)
        else:
            codes = mx.quantize(mx.array(padded(some, group_size)), group_size, bits)
            weight, scales, biases = (np.array(x) for x in codes)
            scales, biases = scales.astype(np.float16), biases.astype(np.float16)
            whole = Quantized(weight, scales, biases, bits, group_size, width)
        stop = 0
        for i in members:
            start, stop = stop, stop + len(parts[i][0])
            found[i] = whole.cut(start, stop)
    each = iter(range(len(parts)))
    return [[found[next(each)] for _ in levels] for levels in sizes]


def _by_level(rows: np.ndarray, sizes: Levels) -> list[tuple[np.ndarray, int]]:
    ends = np.cumsum([n for n, _ in sizes])[:-1]
    return [(part, bits) for part, (_, bits) in zip(np.split(rows, ends), sizes)]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words of rows of codes, as one stream of bits from the lowest up."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<u4")
