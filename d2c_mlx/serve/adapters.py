"""One base model, the adapters that requests may name, and batches whose rows mix them.

Adapters in memory are stacked per module, one in each slot; each row takes its factors from the
stack (S-LoRA, https://arxiv.org/abs/2311.03285; here by `mx.gather_mm`).

Which adapter a row has is one more entry of its prompt cache, not a table beside the batch:
mlx-lm's batch generator merges, filters and splits caches itself, so a row cannot get another's
adapter, and nothing of mlx-lm's is replaced.

The scheduler's thread reads an adapter, gives it a slot and takes that away again, between two
tokens. What runs keeps what it began with: every load is an `Entry` of its own, which leaves when
it is no longer served and its last request has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.packs.pack import Pack

# `a (1, in, r)` and `b (1, r, out)` of a module.
Pair = tuple[mx.array, mx.array]
# Module path -> rank of an adapter.
Ranks = Mapping[str, int]


@dataclass(eq=False)
class Entry:
    """One load of an adapter; another load, even of the same name, is another entry.

    Attributes:
        path: the directory or file it comes from.
        read: reads it; None is the base.
        ranks: of its modules, once it was read.
        slot: in the stacks now, it changes when others come and go; 0 is the base, None is no slot.
        number: unlike that of any other time that an adapter came into memory.
        rows: requests that run with it.
    """

    path: Path
    read: Callable[[], Adapter | None]
    ranks: Ranks | None = None
    slot: int | None = None
    number: int = 0
    rows: int = 0

    def __deepcopy__(self, _memo: object) -> Entry:
        """mlx-lm copies the caches of prompts; their rows keep this very entry."""
        return self


class RowAdapters:
    """The adapter of every row of a batch, `rows`, as an entry of an mlx-lm prompt cache."""

    nbytes = 0
    state = ()

    def __init__(self, rows: Sequence[Entry]) -> None:
        self.rows = list(rows)

    @classmethod
    def merge(cls, caches: Sequence[RowAdapters]) -> RowAdapters:
        """The entry of the batch that these batches make, one after the other."""
        return cls([row for cache in caches for row in cache.rows])

    def extend(self, other: RowAdapters) -> None:
        """Append the rows of another batch."""
        self.rows += other.rows

    def filter(self, keep: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.rows = [self.rows[i] for i in keep]

    def extract(self, row: int) -> RowAdapters:
        """The entry of one row alone."""
        return RowAdapters([self.rows[row]])

    def prepare(self, **_padding: object) -> None:
        """Do nothing, as at its end: padding changes no adapter."""

    finalize = prepare


class _MixedLoRA(nn.Module):
    """`linear(x) + (x @ a[slot]) @ b[slot]`, `a (slots, in, r)` and `b (slots, r, out)`."""

    def __init__(self, linear: nn.Module, adapters: Adapters, shape: tuple[int, int]) -> None:
        super().__init__()
        self.linear, self.adapters = linear, adapters
        dtype = adapters.base.compute_dtype
        self.a, self.b = mx.zeros((1, shape[0], 0), dtype), mx.zeros((1, 0, shape[1]), dtype)

    def __call__(self, x: mx.array) -> mx.array:
        y, slots = self.linear(x), self.adapters.slots
        if not self.a.shape[2] or (isinstance(slots, int) and not slots):
            return y
        if isinstance(slots, int):
            update = (x @ self.a[slots]) @ self.b[slots]
        else:
            update = mx.gather_mm(x, self.a, rhs_indices=slots)
            update = mx.gather_mm(update, self.b, rhs_indices=slots)
        return y + update.astype(y.dtype)

    def arrange(self, slots: Sequence[int | Pair], rank: int) -> None:
        """Stack new factors and those of slots, 0 for no update, all at one rank."""
        pairs = [
            (self.a[x : x + 1, :, :rank], self.b[x : x + 1, :rank]) if isinstance(x, int) else x
            for x in slots
        ]
        pads = [(0, rank - a.shape[2]) for a, _ in pairs]
        none = (0, 0)
        self.a = mx.concatenate([mx.pad(a, [none, none, pad]) for (a, _), pad in zip(pairs, pads)])
        self.b = mx.concatenate([mx.pad(b, [none, pad, none]) for (_, b), pad in zip(pairs, pads)])
        # Module by module: before the next, what this one had is free.
        mx.eval(self.a, self.b)


class Adapters:
    """A base model with the adapters of a pack, and those that came later.

    Call it like an mlx-lm model, with caches made by `cache`. For one adapter at a time use
    `serve.load`, which needs less memory. One thread calls everything.

    Attributes:
        base: the model that it runs; its linear modules are replaced, so nothing else may use it.
        base_entry: that of rows without an adapter.
        names: name in a request -> entry. It is replaced, never changed: any thread may read it.
        memory: most bytes of adapters in memory. One always fits.
        slots: of the batch that runs: one for all rows, or one for each, `(rows,)`.
        n_loaded: adapters that were put into memory so far.
        n_evicted: those of them that had to leave it for others.
    """

    def __init__(self, base: Model, pack: Pack, memory: int) -> None:
        """Load all adapters of a pack, or none before it is asked for where not all fit.

        Raises:
            AdapterError: an adapter is not of this base.
            PackError: an adapter cannot be read.
        """
        self.base, self.memory = base, memory
        self.slots: int | mx.array = 0
        self.n_loaded = self.n_evicted = 0
        self.base_entry = Entry(pack.path, lambda: None, {}, 0)
        self._linears = dict(base.model.named_modules())
        self._modules: dict[str, _MixedLoRA] = {}
        self._numbers = itertools.count(1)
        # Those in memory, used longest ago first; some may not be served any more.
        self._seated: list[Entry] = []
        entries: dict[Any, Entry] = {}
        for key, (task, *_) in pack.adapters.items():
            path = pack.path if pack.storage == "compact" else pack.path / str(key)
            entries[key] = Entry(path, partial(pack.load, task))
        self.names: Mapping[str, Entry] = {
            task: entries.get(key, self.base_entry) for task, key in pack.tasks.items()
        }
        factors: dict[Entry, Mapping[str, Pair]] = {}
        for entry in entries.values():
            factors[entry] = self._read(entry)
            if self._nbytes_of(factors) > memory:
                return
        self._arrange(factors)

    def begin(self, entry: Entry) -> None:
        """A request runs with an adapter now."""
        entry.rows += 1
        if entry in self._seated:
            self._seated.remove(entry)
            self._seated.append(entry)

    def end(self, entry: Entry) -> None:
        """A request has ended; an adapter that is no longer served leaves with its last one."""
        entry.rows -= 1
        self.replace(self.names)

    def replace(self, names: Mapping[str, Entry]) -> None:
        """Serve these names instead of all others; what is left out leaves when it is not used."""
        self.names, served = names, {*names.values()}
        gone = [entry for entry in self._seated if not entry.rows and entry not in served]
        if gone:
            self._arrange({}, gone)

    def load(self, entry: Entry) -> bool:
        """Have an adapter in memory, in place of those that were used longest ago.

        Returns:
            False if it does not fit beside those that are in use.

        Raises:
            InputError: it cannot be read, or is of another base.
        """
        if entry.slot is not None:
            return True
        factors = None if entry.ranks else self._read(entry)
        left = [*self._seated, entry]
        idle = [other for other in self._seated if not other.rows]
        evicted: list[Entry] = []
        while len(left) > 1 and self._nbytes_of(left) > self.memory:
            if not idle:
                return False
            evicted.append(idle.pop(0))
            left.remove(evicted[-1])
        self._arrange({entry: factors or self._read(entry)}, evicted)
        self.n_evicted += len(evicted)
        return True

    def _read(self, entry: Entry) -> Mapping[str, Pair]:
        """The factors of an adapter by module, while nothing else of it is in memory."""
        adapter = entry.read()
        assert adapter is not None
        check_adapter(adapter, self.base.module_shapes, entry.path)
        factors = {path: self.base.stacked_factors(path, [adapter]) for path in adapter.modules}
        mx.eval(list(factors.values()))
        entry.ranks = {path: a.shape[2] for path, (a, _) in factors.items()}
        return factors

    def _arrange(
        self, arriving: Mapping[Entry, Mapping[str, Pair]], leaving: Iterable[Entry] = ()
    ) -> None:
        """Take adapters out of memory, and put others in."""
        for entry in leaving:
            self._seated.remove(entry)
            entry.slot = None
        for path in {path for factors in arriving.values() for path in factors} - {*self._modules}:
            shape = self.base.module_shapes[path]
            self._modules[path] = _MixedLoRA(self._linears[path], self, shape)
            self.base.model.update_modules(tree_unflatten([(path, self._modules[path])]))
        ranks = _highest([*self._seated, *arriving])
        for path, module in self._modules.items():
            slots: list[int | Pair] = [0]
            slots += [path in (x.ranks or ()) and x.slot or 0 for x in self._seated]
            slots += [factors.get(path, 0) for factors in arriving.values()]
            module.arrange(slots, ranks.get(path, 0))
        for entry in arriving:
            entry.number = next(self._numbers)
        self.n_loaded += len(arriving)
        self._seated += arriving
        for slot, entry in enumerate(self._seated, 1):
            entry.slot = slot

    def _nbytes_of(self, entries: Iterable[Entry]) -> int:
        """Bytes that adapters take together: each has the highest of all ranks."""
        entries, shapes = [*entries], self.base.module_shapes
        width = sum(rank * sum(shapes[path]) for path, rank in _highest(entries).items())
        # The base has a slot, too.
        return (1 + len(entries)) * width * self.base.compute_dtype.size

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(x.nbytes for module in self._modules.values() for x in (module.a, module.b))

    def cache(self, entry: Entry, layers: Sequence[Any] = ()) -> list[Any]:
        """A prompt cache for one sequence, which has what `layers` has; else it is empty."""
        return [*(layers or make_prompt_cache(self.base.model)), RowAdapters([entry])]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits `(rows, length, vocabulary)` of token ids `(rows, length)`."""
        *layers, rows = cache
        slots = [entry.slot or 0 for entry in rows.rows]
        self.slots = slots[0] if len(set(slots)) == 1 else mx.array(slots)
        try:
            return self.base.model(tokens, cache=layers)
        finally:
            # The router runs the inner model directly, as the base.
            self.slots = 0


def _highest(entries: Iterable[Entry]) -> dict[str, int]:
    """The highest rank of each module."""
    highest: dict[str, int] = {}
    for entry in entries:
        for path, rank in (entry.ranks or {}).items():
            highest[path] = max(highest.get(path, 0), rank)
    return highest
