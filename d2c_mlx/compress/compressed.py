"""Adapters in low-bit factors, as `quantize.py` makes them and `compact_file.py` stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.compress.affine import Quantized, dequantize
from d2c_mlx.utils.sequences import indices_by_key

__all__ = ["Compressed", "Level"]


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
        group_size: numbers that share a scale and a bias, in all factors.
        base: the base model's name.
        sources: names of the adapters it was merged from.
    """

    name: str
    modules: Mapping[str, tuple[Level, ...]]
    group_size: int = 64
    base: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all factors, without any header."""
        return sum(level.nbytes for levels in self.modules.values() for level in levels)

    def scaled(self, factor: float) -> Compressed:
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
        rank = max(sum(level.rank for level in levels) for levels in self.modules.values())
        a, b = (
            _padded_factors(
                [[getattr(x, name) for x in levels] for levels in self.modules.values()], rank
            )
            for name in "ab"
        )
        modules = {path: LoRA(x.T, y) for path, x, y in zip(self.modules, a, b)}
        return Adapter(self.name, modules, self.base, self.sources).uniform(dtype)


def _padded_factors(factors: Sequence[Sequence[Quantized]], rank: int) -> list[mx.array]:
    """Rows of every factor, level after level and then zeros, float16 `(rank, width)`.

    Factors of one width share one array; an array for each takes twice as long.
    """
    values = iter(dequantize([part for levels in factors for part in levels]))
    rows = [[next(values) for _ in levels] for levels in factors]
    found: dict[int, mx.array] = {}
    for width, members in indices_by_key(levels[0].width for levels in factors).items():
        stack = np.zeros((len(members), rank, width), np.float16)
        for place, i in zip(stack, members):
            place[: sum(map(len, rows[i]))] = np.concatenate(rows[i])
        found |= dict(zip(members, mx.array(stack)))
    return [found[i] for i in range(len(factors))]
