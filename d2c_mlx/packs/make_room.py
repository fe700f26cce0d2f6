"""Room for an arriving adapter in the bytes of a compact pack."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.compact_file import compact_nbytes, index_of
from d2c_mlx.compress.compressed import Compressed, Level, dequantize
from d2c_mlx.compress.quantize import compress, svd_components
from d2c_mlx.compress.storage import allocate, worth
from d2c_mlx.evaluate.distill import module_gains
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.line_search import FINE_SCALES, line_search

__all__ = ["Room", "make_room"]


@dataclass(frozen=True)
class Room:
    """Adapters that fit into one file together.

    Attributes:
        stored: those that were there, in their order, and the new one.
        dropped: components that the others lost.
        energy: the largest share of `|dW|^2` that one of them lost.
    """

    stored: list[Compressed]
    dropped: int
    energy: float


def make_room(
    others: Sequence[Compressed],
    adapter: Adapter,
    limit: int | None,
    scorer: Scorer | None = None,
    rows: ExampleSet | None = None,
) -> Room:
    """Store an adapter in an equal share of the bytes beside others.

    Use it to add to a compact pack. Components at the same bits of a module are mixed in their
    rows, so they are dropped together or not at all; the rest keeps its codes, and nothing is
    rounded twice. The least energy per byte is dropped first, as a share of its adapter's energy.

    Args:
        others: those in the file.
        adapter: any ranks and scales.
        limit: the most bytes of the file; None stores the arrival in the others' mean size.
        scorer: measures the contribution of the arrival's modules, and its scale; None decides by
            energy.
        rows: calibration rows of the arrival, which `scorer` needs.

    Raises:
        BudgetError: another adapter would lose all it has.
    """
    share = sum(other.nbytes for other in others) / max(len(others), 1)
    if limit is not None:
        share = min(limit / (len(others) + 1), share or limit)
    arrival = _arrival(adapter, share, limit, scorer, rows)
    pieces = []
    for k, other in enumerate(others):
        levels = [(path, level) for path, stored in other.modules.items() for level in stored]
        total = sum(_energy(level) for _, level in levels) or 1.0
        for path, level in levels:
            energy = _energy(level) / total
            pieces.append((energy / level.nbytes, k, path, level.bits, level.rank, energy))
    pieces.sort()

    def without(n: int) -> list[Compressed]:
        """The others without the first `n` pieces."""
        gone = {piece[1:4] for piece in pieces[:n]}
        left = []
        for k, other in enumerate(others):
            modules = {
                path: tuple(level for level in levels if (k, path, level.bits) not in gone)
                for path, levels in other.modules.items()
            }
            modules = {path: levels for path, levels in modules.items() if levels}
            left.append(replace(other, modules=modules))
        return left

    def nbytes(n: int) -> int:
        return compact_nbytes(index_of([*without(n), arrival]))

    n = 0
    if limit is not None:
        n = bisect_left(range(len(pieces)), -limit, key=lambda n: -nbytes(n))
    kept = without(n)
    emptied = any(old.modules and not new.modules for old, new in zip(others, kept))
    if emptied or (limit is not None and nbytes(n) > limit):
        raise BudgetError(
            f"budget: {limit or 0:,} bytes have no room for {len(others) + 1} adapters; give more,"
            " or remove a task"
        )
    lost = np.zeros(len(others))
    for _, k, *_, energy in pieces[:n]:
        lost[k] += energy
    dropped = sum(rank for *_, rank, _ in pieces[:n])
    return Room([*kept, arrival], dropped, float(np.max(lost, initial=0)))


def _energy(level: Level) -> float:
    """`|a^T b|^2` in Frobenius norm."""
    a, b = (x.astype(np.float64) for x in dequantize([[level.a], [level.b]]))
    return float(np.sum((a @ a.T) * (b @ b.T)))


def _arrival(
    adapter: Adapter,
    nbytes: float,
    limit: int | None,
    scorer: Scorer | None,
    rows: ExampleSet | None,
) -> Compressed:
    """The arrival in `nbytes`, or in fewer if a file of it alone would be over `limit`."""
    parts = svd_components(adapter)
    gains = module_gains(scorer.engine.base, adapter, rows) if scorer and rows else {}
    values = worth(parts, [gains])
    widths = {path: sum(lora.shape) for path, lora in adapter.modules.items()}

    def within(nbytes: float) -> Compressed:
        return compress(adapter, allocate(values, widths, nbytes), parts)

    small = within(nbytes)
    most = np.inf if limit is None else limit
    while small.modules and compact_nbytes(index_of([small])) > most:
        # The header and padding of its file are no part of the share.
        nbytes *= 0.9
        small = within(nbytes)
    if not small.modules:
        raise BudgetError(
            f"budget: {nbytes:,.0f} bytes, an equal share, hold no component of {adapter.name!r};"
            " give more, or remove a task"
        )
    if not scorer or not rows:
        return small

    def loss(scale: float) -> float:
        again = small.scaled(scale).adapter(scorer.engine.base.dtype)
        return float(scorer.losses([(again, [rows])], in_parts=True)[0][0])

    # The first scale from 1 up after which the loss rises.
    return small.scaled(line_search(loss, FINE_SCALES[FINE_SCALES.index(1.0) :], 1.0)[0])
