"""Where an arriving adapter fits: by losses on calibration rows, and in the bytes left."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.compress.compact_file import compact_nbytes, index_of
from d2c_mlx.compress.compressed import Compressed, dequantize
from d2c_mlx.compress.quantize import svd_components
from d2c_mlx.compress.storage import allocate, compact_store, worth
from d2c_mlx.evaluate.attribution import module_gains
from d2c_mlx.evaluate.scorer import Scorer, normalized_regret
from d2c_mlx.merge.methods import scaled
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import BudgetError
from d2c_mlx.utils.line_search import COARSE_SCALES, FINE_SCALES, line_search

__all__ = ["Judge", "Room", "make_room"]

# How finely bytes are shared out between an adapter and the header.
_PARTS = 256


class Judge:
    """Decides by losses on calibration rows; without a judge, `add_adapter` decides by weights.

    Tasks of the pack without rows do not count.
    """

    def __init__(self, base: BaseModel, scorer: Scorer, probes: Mapping[str, ExampleSet]) -> None:
        """Judge on a base model.

        Args:
            base: the pack's base model.
            scorer: evaluates losses on the base model.
            probes: task -> calibration rows; the arriving task must be among them.
        """
        self._base, self._scorer, self._probes = base, scorer, probes

    def best(
        self,
        merges: Mapping[str, Adapter],
        slots: Mapping[str, Adapter],
        served: Mapping[str | int, Sequence[str]],
        new: Adapter,
    ) -> tuple[str, Adapter]:
        """Find the merge that costs least, and tune its scale.

        A task's cost is the rise of its loss, as a share of its gain over the base before.

        Args:
            merges: slot -> the slot's adapter with the new one merged in.
            slots: slot -> its adapter before.
            served: slot -> tasks.
            new: the adapter that arrives.

        Returns:
            The slot, and its merge at the best scale.
        """
        tuned = {}
        for slot, merge in merges.items():
            tasks = [task for task in served[slot] if task in self._probes]
            own = np.concatenate([self._losses(slots[slot], tasks), self._losses(new, [new.name])])
            tasks.append(new.name)
            bare = self._losses(None, tasks)

            def cost(
                scale: float,
                merge: Adapter = merge,
                tasks: Sequence[str] = tasks,
                own: np.ndarray = own,
                bare: np.ndarray = bare,
            ) -> float:
                losses = self._losses(scaled(merge, scale), tasks)
                return float(normalized_regret(losses, own, bare).sum())

            scale, lowest = line_search(cost, COARSE_SCALES)
            tuned[slot] = lowest, scale
        name = min(tuned, key=lambda slot: (tuned[slot][0], slot))
        return name, scaled(merges[name], tuned[name][1])

    def gains(self, adapter: Adapter) -> dict[str, float]:
        """Contribution of each module of the arriving adapter, in nats, see `module_gains`."""
        return module_gains(self._base, adapter, self._probes[adapter.name])

    def scaled(self, small: Compressed) -> Compressed:
        """The stored form at the first scale from 1 up after which its task's loss rises."""

        def loss(scale: float) -> float:
            adapter = small.scaled(scale).adapter(self._base.dtype)
            return float(self._losses(adapter, [small.name])[0])

        return small.scaled(line_search(loss, FINE_SCALES[FINE_SCALES.index(1.0) :], 1.0)[0])

    def _losses(self, adapter: Adapter | None, tasks: Sequence[str]) -> np.ndarray:
        if not tasks:
            return np.zeros(0)
        return self._scorer.losses_in_parts([(adapter, [self._probes[t] for t in tasks])])[0]


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
    share = sum(other.nbytes for other in others) / max(len(others), 1)
    if limit is not None:
        share = min(limit / (len(others) + 1), share or limit)
    arrival = _arrival(adapter, share, limit, others[0].group_size if others else 64, judge)
    pieces = _by_energy(others)

    def without(n: int) -> list[Compressed]:
        """The others without the first `n` pieces."""
        gone = {(piece.adapter, piece.path, piece.bits) for piece in pieces[:n]}
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
    for piece in pieces[:n]:
        lost[piece.adapter] += piece.energy
    dropped = sum(piece.rank for piece in pieces[:n])
    return Room(kept, arrival, dropped, float(np.max(lost, initial=0)))


def _arrival(
    adapter: Adapter, nbytes: float, limit: int | None, size: int, judge: Judge | None
) -> Compressed:
    """The arrival in `nbytes`, or in fewer if a file of it alone would be over `limit`."""
    parts = svd_components(adapter)
    values = worth(parts, [judge.gains(adapter) if judge else {}])
    widths = {path: sum(lora.shape) for path, lora in adapter.modules.items()}

    def within(nbytes: float) -> Compressed:
        levels = allocate(values, widths, nbytes)
        kept = {path: stored for path, stored in levels.items() if stored}
        return compact_store(adapter, kept, size=size, parts=parts)

    def file_nbytes(alone: Compressed) -> int:
        return compact_nbytes(index_of([alone]))

    small = within(nbytes)
    if limit is not None and file_nbytes(small) > limit:
        # A share of everything leaves nothing for the header, which few components make smaller.
        step = nbytes / _PARTS
        fit = bisect_right(range(_PARTS), limit, key=lambda n: file_nbytes(within(n * step)))
        small = within((fit - 1) * step)
    if not small.modules:
        raise BudgetError(
            f"budget: {nbytes:,.0f} bytes, an equal share, hold no component of {adapter.name!r};"
            " give more, or remove a task"
        )
    return judge.scaled(small) if judge else small


class _Piece(NamedTuple):
    """One level of a module of an adapter, which can be dropped; the first are dropped first."""

    energy_per_byte: float
    adapter: int
    path: str
    bits: int
    rank: int
    energy: float


def _by_energy(others: Sequence[Compressed]) -> list[_Piece]:
    """All levels, the least energy per byte first; energies are shares of an adapter's `|dW|^2`."""
    pieces = []
    for k, other in enumerate(others):
        levels = [(path, level) for path, stored in other.modules.items() for level in stored]
        energies = []
        for _, level in levels:
            # |a^T b|^2 in Frobenius norm.
            a, b = (x.astype(np.float64) for x in dequantize([level.a, level.b]))
            energies.append(float(np.sum((a @ a.T) * (b @ b.T))))
        total = sum(energies) or 1.0
        for (path, level), energy in zip(levels, energies):
            share = energy / total
            pieces.append(_Piece(share / level.nbytes, k, path, level.bits, level.rank, share))
    return sorted(pieces)
