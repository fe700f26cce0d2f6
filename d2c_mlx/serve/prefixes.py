"""Beginnings that prompts share, a system message and examples say, which are processed once.

Kept are keys and values of the layers, by hashes of the adapter's load, its scale and the tokens:
what one adapter made is never found for another, nor for new weights under an old name. The tokens
themselves are not kept. mlx-lm's `LRUPromptCache` keeps whole prompts, forgets those first that
came first, however often they are asked for, and cannot drop those of one adapter.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

__all__ = ["Beginning", "Prefixes"]

# Beginnings end at multiples of so many tokens, as those of vLLM.
_BLOCK = 16
# Hashes of beginnings that are remembered, to find those that come again: some megabytes.
_MOST_SEEN = 1 << 14


@dataclass(frozen=True)
class Beginning:
    """The beginning of one prompt.

    Attributes:
        n_kept: tokens whose keys and values are there.
        layers: those, one mlx-lm cache for each layer; nothing may change them.
        n_shared: tokens that came before, with whose end the next ones are to be kept; 0 is none.
        name: hash of these.
        load: see `Prefixes.find`.
    """

    n_kept: int = 0
    layers: Sequence[Any] = ()
    n_shared: int = 0
    name: bytes = b""
    load: int = 0


class _Kept(NamedTuple):
    load: int
    layers: Sequence[Any]
    nbytes: int


class Prefixes:
    """Keys and values of beginnings that came twice; those used longest ago give way.

    Attributes:
        nbytes: of all.
    """

    def __init__(self, memory: int) -> None:
        """Keep at most so many bytes; 0 keeps nothing."""
        self._memory, self.nbytes = memory, 0
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        # Most blocks of one beginning; more would not fit.
        self._most = 1 << 31

    def find(self, load: int, scale: float, prompt: Sequence[int]) -> Beginning:
        """The longest beginning that is there, and a longer one if it came before.

        Args:
            load: number of the adapter's load into memory; 0 is the base model.
            scale: factor of its update.
            prompt: token ids; the last is never part of a beginning.
        """
        if not self._memory:
            return Beginning()
        names = _names(load, scale, prompt)
        n_kept = next((n for n in range(len(names), 0, -1) if names[n - 1] in self._kept), 0)
        n_seen = next((n for n in range(len(names), 0, -1) if names[n - 1] in self._seen), 0)
        for name in names:
            self._seen[name] = None
            self._seen.move_to_end(name)
        while len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        layers: Sequence[Any] = ()
        if n_kept:
            self._kept.move_to_end(names[n_kept - 1])
            layers = self._kept[names[n_kept - 1]].layers
        n_seen = min(n_seen, self._most)
        if n_seen <= n_kept:
            return Beginning(n_kept * _BLOCK, layers)
        return Beginning(n_kept * _BLOCK, layers, n_seen * _BLOCK, names[n_seen - 1], load)

    def keep(self, one: Beginning, batch: BatchGenerator, uid: int) -> None:
        """Keep what a row has, the shared tokens of a beginning, if it is new and fits."""
        if one.name in self._kept:
            return
        # The last entry is the row's adapter.
        layers = batch.extract_cache([uid])[uid][0][:-1]
        mx.eval([layer.state for layer in layers])
        nbytes = sum(layer.nbytes for layer in layers)
        if nbytes > self._memory:
            self._most = one.n_shared // _BLOCK * self._memory // nbytes
            return
        self._kept[one.name] = _Kept(one.load, layers, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self._memory:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes

    def drop(self, load: int) -> None:
        """Forget what a load of an adapter made; it has left."""
        for name in [name for name, one in self._kept.items() if one.load == load]:
            self.nbytes -= self._kept.pop(name).nbytes


def _names(load: int, scale: float, prompt: Sequence[int]) -> list[bytes]:
    """A hash for each beginning of whole blocks, which is that of the one before and a block."""
    name, found = repr((load, scale)).encode(), list[bytes]()
    for end in range(_BLOCK, len(prompt), _BLOCK):
        block = array("q", prompt[end - _BLOCK : end]).tobytes()
        name = hashlib.sha256(name + block).digest()
        found.append(name)
    return found
