"""What the engine evaluates together, in which order, and what it keeps meanwhile."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import mlx.core as mx

from d2c_mlx.adapter import Adapter
from d2c_mlx.tasks import ExampleSet

__all__ = ["LOT", "Kept", "Piece", "balanced", "groups", "lots"]

Piece = tuple[Adapter | None, ExampleSet]
# Sets are evaluated in lots of about this many tokens: after each lot its losses are stored.
LOT = 6144


def groups(pieces: Sequence[Piece], stack: int) -> Iterator[list[list[int]]]:
    """Piece indices by adapter; up to `stack` adapters that want the same sets go together."""
    wanted: dict[str, list[int]] = {}
    for i, (adapter, _) in enumerate(pieces):
        wanted.setdefault(adapter.digest if adapter else "base", []).append(i)
    alike: dict[tuple[str, ...], list[list[int]]] = {}
    for indices in wanted.values():
        alike.setdefault(tuple(pieces[i][1].digest for i in indices), []).append(indices)
    for group in alike.values():
        yield from (group[start : start + stack] for start in range(0, len(group), stack))


def lots(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive indices, cut when a lot has enough tokens."""
    lot: list[int] = []
    for i, _ in enumerate(sizes):
        lot.append(i)
        if sum(sizes[j] for j in lot) >= LOT:
            yield lot
            lot = []
    if lot:
        yield lot


def balanced(sizes: Sequence[int], n: int) -> list[list[int]]:
    """Indices for each of `n` streams, the largest always to the least loaded."""
    shares: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    return shares


class Kept:
    """Hidden states within a number of bytes; the least recently used go first."""

    def __init__(self, nbytes: int) -> None:
        self._free = nbytes
        self._entries: OrderedDict[object, list[mx.array]] = OrderedDict()

    def get(self, key: object) -> list[mx.array] | None:
        """What was put under `key`, if it is still there."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: object, arrays: list[mx.array]) -> None:
        """Keep arrays, unless they alone are too large; others may have to go."""
        size = sum(x.nbytes for x in arrays)
        held = sum(x.nbytes for entry in self._entries.values() for x in entry)
        if size > self._free + held:
            return
        while size > self._free:
            _, old = self._entries.popitem(last=False)
            self._free += sum(x.nbytes for x in old)
        self._entries[key] = arrays
        self._free -= size
