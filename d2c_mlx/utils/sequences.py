"""Many items: indices by key, equal ones as one object, those too large to be in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from typing import TypeVar, overload

__all__ = ["OnDemand", "indices_by_key", "shared"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def indices_by_key(keys: Iterable[K]) -> dict[K, list[int]]:
    """Map each distinct key to the indices where it occurs, in ascending order.

    Distinct keys are in order of their first occurrence.
    """
    indices: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    return indices


@cache
def shared(value: K) -> K:
    """One object for equal values; the first of them stays for the life of the process.

    Use it for small parts of many objects that wait: a plan for 100 adapters has 100,000 modules in
    its forms, and few differ.
    """
    return value


class OnDemand(Sequence[T]):
    """A sequence that reads an item whenever it is asked for it, and keeps none."""

    def __init__(self, read: Callable[[int], T], n: int) -> None:
        """Have `n` items, of which `read(k)` gives the k-th."""
        self._read, self._n = read, n

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, k: int) -> T: ...

    @overload
    def __getitem__(self, k: slice) -> list[T]: ...

    def __getitem__(self, k: int | slice) -> T | list[T]:
        numbers = range(self._n)[k]
        if isinstance(numbers, range):
            return [self._read(i) for i in numbers]
        return self._read(numbers)
