"""Things that are alike, found in one pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

__all__ = ["alike"]

K = TypeVar("K", bound=Hashable)


def alike(keys: Iterable[K]) -> dict[K, list[int]]:
    """The places of every key, in their order."""
    places: dict[K, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return places
