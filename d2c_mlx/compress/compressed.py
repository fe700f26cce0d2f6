"""Adapters in low-bit factors, in MLX's affine codes.

Every group of numbers of a row shares a scale and a bias, `value = scale * code + bias`, so
`mx.dequantize` reads them. `quantize.py` makes such adapters, `compact_file.py` stores them.

Source: MLX's `quantize`,
https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.batches import indices_by_key

# Bits of a number, and numbers that share a scale and a bias in a compact pack.
BITS, GROUP_SIZE = (16, 8, 4, 3, 2), 64
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

    def scaled(self, factor: float) -> Self:
        """The numbers times a factor; the codes stay, and scales and biases are float16 again."""
        names = ("weight",) if self.bits == 16 else ("scales", "biases")
        changed = {
            name: (getattr(self, name) * np.float32(factor)).astype(np.float16) for name in names
        }
        return replace(self, **changed)


def dequantize(factors: Sequence[Sequence[Quantized]]) -> list[np.ndarray]:
    """The numbers of every factor, float16 `(rows, width)`, the same bits on every device.

    Use it for many factors at once: parts of one kind are computed in one call, which takes a tenth
    of the time of a call for each.

    Args:
        factors: each a list of levels, whose rows stand one below the other.
    """
    parts = [part for factor in factors for part in factor]
    kinds = indices_by_key((part.bits, part.group_size, part.width) for part in parts)
    values: dict[int, np.ndarray] = {}
    for (bits, group_size, width), members in kinds.items():
        weight, scales, biases = (
            np.concatenate([getattr(parts[i], name) for i in members])
            for name in ("weight", "scales", "biases")
        )
        if bits != 16:
            # In float32, scale * code is exact; it is then rounded to float16 once. So every device
            # gives the same bits. In float16 a kernel may round the product first.
            scale, bias = (mx.array(x.astype(np.float32)) for x in (scales, biases))
            numbers = mx.dequantize(mx.array(weight), scale, bias, group_size, bits)
            weight = np.array(numbers[:, :width].astype(mx.float16))
        ends = np.cumsum([len(parts[i].weight) for i in members])[:-1]
        values |= zip(members, np.split(weight, ends))
    each = iter(range(len(parts)))
    return [np.concatenate([values[next(each)] for _ in factor]) for factor in factors]


def packed_columns(width: int, bits: int) -> tuple[int, int]:
    """`(columns of weight, groups)` of rows of `width` numbers, to compute sizes in advance."""
    if bits == 16:
        return width, 0
    groups = -(-width // GROUP_SIZE)
    return groups * GROUP_SIZE * bits // 32, groups


@dataclass(frozen=True, eq=False)
class Level:
    """Components of one module at the same bits.

    Attributes:
        a: `(n, in)`, the columns of the LoRA's `a` as rows.
        b: `(n, out)`, the rows of the LoRA's `b`.
    """

    a: Quantized
    b: Quantized

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return self.a.bits

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.a.weight)

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class Compressed:
    """An adapter in low-bit factors, as `quantize.compress` makes it and a compact pack stores it.

    Attributes:
        name: the adapter's name.
        modules: module path -> its levels; modules without components are left out.
        base: the base model's name.
        sources: names of the adapters it was merged from.
    """

    name: str
    modules: Mapping[str, tuple[Level, ...]]
    base: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, without any header."""
        return sum(level.nbytes for levels in self.modules.values() for level in levels)

    def scaled(self, factor: float) -> Self:
        """The adapter with every dW times a factor: the same codes and bytes, other scales of b."""
        if factor == 1:
            return self
        modules = {
            path: tuple(Level(level.a, level.b.scaled(factor)) for level in levels)
            for path, levels in self.modules.items()
        }
        return replace(self, modules=modules)

    def adapter(self, dtype: mx.Dtype = mx.float16) -> Adapter | None:
        """The plain adapter, to evaluate, serve or export; None if no module is left.

        Args:
            dtype: the dtype of the base's activations. `dequantize` gives float16; others are cast.

        Raises:
            AdapterError: as `Adapter.uniform`.
        """
        if not self.modules:
            return None
        modules = self.modules.values()
        rows = dequantize([[level.a for level in levels] for levels in modules])
        columns = dequantize([[level.b for level in levels] for levels in modules])
        loras = map(LoRA, (mx.array(x).T for x in rows), map(mx.array, columns))
        plain = Adapter(self.name, dict(zip(self.modules, loras)), self.base, self.sources)
        return plain.uniform(dtype)
