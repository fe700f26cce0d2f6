"""Make room for another adapter in a compact pack: drop what the stored ones need least."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.affine import dequantize
from d2c_mlx.compress.allocate import allocate
from d2c_mlx.compress.candidates import worth
from d2c_mlx.compress.compact_file import index_of
from d2c_mlx.compress.compressed import Compressed, Level
from d2c_mlx.compress.file_layout import compact_nbytes
from d2c_mlx.compress.quantize import svd_components
from d2c_mlx.compress.storage import compact_store
from d2c_mlx.packs.judge import Judge
from d2c_mlx.utils.errors import BudgetError

__all__ = ["Room", "make_room"]

# How finely bytes are shared out between an adapter and the header.
_PARTS = 256


@dataclass(frozen=True)
class Room:
    """Adapters that fit into one file together.

    Attributes:
        others: those that were there, in their order.
        arrival: the new one.
        dropped: components that the others lost.
        energy: the largest share of `|dW|^2` that one of them lost.
    """

    others: list[Compressed]
    arrival: Compressed
    dropped: int
    energy: float


def make_room(
    others: Sequence[Compressed], adapter: Adapter, limit: int | None, judge: Judge | None = None
) -> Room:
    """Store an adapter in an equal share of the bytes beside others.

    Use it to add to a compact pack. Components at the same bits of a module are mixed in their
    rows, so they are dropped together or not at all; the rest keeps its codes, and nothing is
    rounded twice. The least energy per byte is dropped first, as a share of its adapter's energy.

    Args:
        others: of one group size.
        adapter: any ranks and scales.
        limit: the most bytes of the file; None stores the arrival in the others' mean size.
        judge: measures the contribution of the arrival's modules, and its scale; None decides by
            energy.

    Raises:
        BudgetError: another adapter would lose all it has.
    """
    size = others[0].group_size if others else 64
    share = sum(one.nbytes for one in others) / max(len(others), 1)
    if limit is not None:
        share = min(limit / (len(others) + 1), share or limit)
    arrival = _arrival(adapter, share, limit, size, judge)
    order = _by_energy(others)
    fewest, most = 0, 0 if limit is None else len(order)
    while limit is not None and fewest < most:
        middle = (fewest + most) // 2
        kept = _without(others, order[:middle])
        if compact_nbytes(index_of([*kept, arrival])) <= limit:
            most = middle
        else:
            fewest = middle + 1
    kept = _without(others, order[:most])
    emptied = [old.name for old, new in zip(others, kept) if old.modules and not new.modules]
    over = limit is not None and compact_nbytes(index_of([*kept, arrival])) > limit
    if over or emptied:
        raise BudgetError(
            f"budget: {limit or 0:,} bytes have no room for {len(others) + 1} adapters; give more,"
            " or remove a task"
        )
    gone = order[:most]
    lost = np.zeros(len(others))
    for one in gone:
        lost[one.adapter] += one.energy
    return Room(kept, arrival, sum(one.rank for one in gone), float(np.max(lost, initial=0)))


def _arrival(
    adapter: Adapter, nbytes: float, limit: int | None, size: int, judge: Judge | None
) -> Compressed:
    """The arrival in `nbytes`, or in fewer if a file of it alone would be over `limit`."""
    parts = svd_components(adapter)
    values = worth(parts, [judge.gains(adapter) if judge else {}])
    widths = {path: sum(lora.shape) for path, lora in adapter.modules.items()}

    def within(nbytes: float) -> Compressed:
        levels = allocate(values, widths, nbytes)
        kept = {path: some for path, some in levels.items() if some}
        return compact_store(adapter, kept, size=size, parts=parts)

    small = within(nbytes)
    if limit is not None and _file_nbytes(small) > limit:
        # A share of everything leaves nothing for the header, which few components make smaller.
        step = nbytes / _PARTS
        fit = bisect_right(range(_PARTS), limit, key=lambda n: _file_nbytes(within(n * step)))
        small = within((fit - 1) * step)
    if not small.modules:
        raise BudgetError(
            f"budget: {nbytes:,.0f} bytes, an equal share, hold no component of {adapter.name!r};"
            " give more, or remove a task"
        )
    return judge.scaled(small) if judge else small


def _file_nbytes(alone: Compressed) -> int:
    return compact_nbytes(index_of([alone]))


@dataclass(frozen=True)
class _Piece:
    """One level of a module of an adapter, which can be dropped.

    Attributes:
        adapter: position of the adapter.
        path: of the module.
        bits: of the level.
        rank: number of its components.
        energy: its share of the adapter's `|dW|^2`.
        per_byte: `energy` per stored byte.
    """

    adapter: int
    path: str
    bits: int
    rank: int
    energy: float
    per_byte: float


def _by_energy(others: Sequence[Compressed]) -> list[_Piece]:
    """All levels, the least energy per byte first; ties by adapter, module and bits."""
    pieces = []
    for k, one in enumerate(others):
        energies = {
            (path, level.bits): (_energy(level), level)
            for path, levels in one.modules.items() for level in levels
        }  # fmt: skip
        total = sum(energy for energy, _ in energies.values()) or 1.0
        pieces += [
            _Piece(k, path, bits, level.rank, energy / total, energy / total / level.nbytes)
            for (path, bits), (energy, level) in energies.items()
        ]
    return sorted(pieces, key=lambda one: (one.per_byte, one.adapter, one.path, one.bits))


def _energy(level: Level) -> float:
    """`|a^T b|^2` in Frobenius norm."""
    a, b = (x.astype(np.float64) for x in dequantize([level.a, level.b]))
    return float(np.sum((a @ a.T) * (b @ b.T)))


def _without(others: Sequence[Compressed], gone: Sequence[_Piece]) -> list[Compressed]:
    left = []
    for k, one in enumerate(others):
        mine = {(piece.path, piece.bits) for piece in gone if piece.adapter == k}
        modules = {
            path: tuple(level for level in levels if (path, level.bits) not in mine)
            for path, levels in one.modules.items()
        }
        modules = {path: levels for path, levels in modules.items() if levels}
        left.append(replace(one, modules=modules))
    return left
