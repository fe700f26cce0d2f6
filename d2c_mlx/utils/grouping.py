"""Grouping the items of a sequence by a key, in one pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

__all__ = ["indices_by_key"]

K = TypeVar("K", bound=Hashable)


def indices_by_key(keys: Iterable[K]) -> dict[K, list[int]]:
    """Map each distinct key to the indices where it occurs, in ascending order.

    Distinct keys are in order of their first occurrence.
    """
    indices: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        indices.setdefault(key, []).append(i)
    return indices
