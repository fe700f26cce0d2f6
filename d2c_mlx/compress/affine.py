"""MLX's affine quantization: rows of numbers as codes of a few bits, and back.

Every group of numbers of a row shares a scale and a bias, `value = scale * code + bias`, so
`mx.dequantize` reads what is made here. This file rounds to nearest; `gptq.py` rounds with less
error, and `quantize.py` decides what is rounded.

Source: MLX's `quantize`,
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from d2c_mlx.utils.sequences import indices_by_key

__all__ = [
    "BITS",
    "GROUP_SIZES",
    "Levels",
    "Quantized",
    "as_float16",
    "dequantize",
    "hartley_rotation",
    "pack_codes",
    "packed_columns",
    "pad_to_groups",
    "round_to_nearest",
    "unpack_codes",
]

BITS, GROUP_SIZES = (16, 8, 4, 3, 2), (32, 64, 128)
# A module's bit allocation, (number of components, bits), the leading components first:
# ((2, 4), (4, 2)) is two components at 4 bit and the next four at 2.
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

    def take_rows(self, start: int, stop: int) -> Quantized:
        """Rows `start` to `stop`."""
        names = ("weight", "scales", "biases")
        return replace(self, **{name: getattr(self, name)[start:stop] for name in names})

    def scaled(self, factor: float) -> Quantized:
        """The numbers times a factor; the codes stay, and scales and biases are float16 again."""
        names = ("weight",) if self.bits == 16 else ("scales", "biases")
        changed = {
            name: (getattr(self, name) * np.float32(factor)).astype(np.float16) for name in names
        }
        return replace(self, **changed)


def dequantize(parts: Sequence[Quantized]) -> list[np.ndarray]:
    """The numbers of every part, float16 `(rows, width)`, the same bits on every device.

    Use it for many parts at once: those of one kind are computed in one call, which takes a third
    less time than a call for each.
    """
    kinds = indices_by_key((part.bits, part.group_size, part.width) for part in parts)
    values: dict[int, np.ndarray] = {}
    for (bits, group_size, width), members in kinds.items():
        same = [parts[i] for i in members]
        rows = np.concatenate([part.weight for part in same])
        if bits != 16:
            # In float32, scale * code is exact; it is then rounded to float16 once. So every device
            # gives the same bits. In float16 a kernel may round the product first.
            scales, biases = (
                mx.array(np.concatenate([getattr(part, name) for part in same]).astype(np.float32))
                for name in ("scales", "biases")
            )
            numbers = mx.dequantize(mx.array(rows), scales, biases, group_size, bits)
            rows = np.array(numbers[:, :width].astype(mx.float16))
        ends = np.cumsum([len(part.weight) for part in same])[:-1]
        values |= dict(zip(members, np.split(rows, ends)))
    return [values[i] for i in range(len(parts))]


def round_to_nearest(
    rows: Sequence[np.ndarray], levels: Sequence[Levels], group_size: int
) -> list[list[Quantized]]:
    """Round many modules with MLX's own `quantize`; scales and biases become float16 after it.

    The fastest rounding; `gptq.gptq_round` takes longer and leaves less error.

    Args:
        rows: `(n, width)` of every module.
        levels: bit allocation of every module, n components in all.
        group_size: one of `GROUP_SIZES`.

    Returns:
        For every module one `Quantized` per level.
    """
    parts = [(part, bits) for pair in zip(rows, levels) for part, bits in _split_levels(*pair)]
    kinds = indices_by_key((bits, part.shape[1]) for part, bits in parts)
    found: dict[int, Quantized] = {}
    for (bits, width), members in kinds.items():
        same = np.concatenate([parts[i][0] for i in members])
        if bits == 16:
            whole = as_float16(same, group_size)
        else:
            codes = mx.quantize(mx.array(pad_to_groups(same, group_size)), group_size, bits)
            weight, scales, biases = (np.array(x) for x in codes)
            scales, biases = scales.astype(np.float16), biases.astype(np.float16)
            whole = Quantized(weight, scales, biases, bits, group_size, width)
        stop = 0
        for i in members:
            start, stop = stop, stop + len(parts[i][0])
            found[i] = whole.take_rows(start, stop)
    each = iter(range(len(parts)))
    return [[found[next(each)] for _ in module] for module in levels]


def _split_levels(rows: np.ndarray, levels: Levels) -> list[tuple[np.ndarray, int]]:
    ends = np.cumsum([n for n, _ in levels])[:-1]
    return [(part, bits) for part, (_, bits) in zip(np.split(rows, ends), levels)]


def hartley_rotation(levels: Levels) -> np.ndarray:
    """`(n, n)` orthogonal matrix that mixes the components within each level.

    Each block is a Hartley matrix, whose entries are all of about one size, so after it the rows of
    a level have one size too; components at 16 bits are left alone.
    """
    blocks = []
    for n, bits in levels:
        angle = 2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
        blocks.append(np.eye(n) if bits == 16 else (np.cos(angle) + np.sin(angle)) / np.sqrt(n))
    from scipy.linalg import block_diag

    return block_diag(*blocks)


def as_float16(rows: np.ndarray, group_size: int) -> Quantized:
    """Rows at 16 bits, which have no groups; `group_size` is kept for the file's index."""
    none = np.zeros((len(rows), 0), np.float16)
    return Quantized(rows.astype(np.float16), none, none, 16, group_size, rows.shape[1])


def packed_columns(width: int, bits: int, group_size: int) -> tuple[int, int]:
    """`(columns of weight, groups)` of rows of `width` numbers, to compute sizes in advance."""
    if bits == 16:
        return width, 0
    groups = -(-width // group_size)
    return groups * group_size * bits // 32, groups


def pad_to_groups(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Rows in float32, padded with zeros at the end to whole groups."""
    return np.pad(rows, [(0, 0), (0, -rows.shape[1] % group_size)]).astype(np.float32)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes `(rows, n)` into uint32 words `(rows, n * bits / 32)`, the lowest bit first.

    Use it for codes that `mx.quantize` did not choose: MLX packs inside that function only.
    """
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(len(codes), -1), axis=1, bitorder="little").view("<u4")


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """The uint8 codes `(rows, n)` in words of `pack_codes` or `mx.quantize`."""
    little = np.ascontiguousarray(words, "<u4").view(np.uint8)
    stream = np.unpackbits(little, axis=1, bitorder="little").reshape(len(words), -1, bits)
    return np.packbits(stream, axis=2, bitorder="little")[..., 0]
