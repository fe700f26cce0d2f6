"""One base model, the adapters that requests may name, and batches whose rows mix them.

Adapters in memory have a slot each. Per module those of like rank are stacked; each row takes its
factors from a stack (S-LoRA, https://arxiv.org/abs/2311.03285; here by `mx.gather_mm`).

Which adapter a row has is one more entry of its prompt cache, not a table beside the batch:
mlx-lm's batch generator merges, filters and splits caches itself, so a row cannot get another's
adapter, and nothing of mlx-lm's is replaced.

The scheduler's thread reads an adapter, gives it a slot and takes that away again, between two
tokens. What runs keeps what it began with: every load is an `Entry` of its own, which leaves when
it is no longer served and its last request has ended.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import chain, count
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
from d2c_mlx.utils.device import evaluation_memory
from d2c_mlx.utils.errors import AdapterError

# `a (1, in, r)` and `b (1, r, out)` of a module; those of an adapter by module path.
Pair = tuple[mx.array, mx.array]
Factors = dict[str, Pair]
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

    def __deepcopy__(self, _memo: object) -> "Entry":
        """mlx-lm copies the caches of prompts; their rows keep this very entry."""
        return self


class RowAdapters:
    """The adapter of every row of a batch, `rows`, as an entry of an mlx-lm prompt cache."""

    nbytes = 0
    state = ()

    def __init__(self, rows: Sequence[Entry]) -> None:
        self.rows = list(rows)

    @classmethod
    def merge(cls, caches: Sequence["RowAdapters"]) -> "RowAdapters":
        """The entry of the batch that these batches make, one after the other."""
        return cls([row for cache in caches for row in cache.rows])

    def extend(self, other: "RowAdapters") -> None:
        """Append the rows of another batch."""
        self.rows += other.rows

    def filter(self, keep: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.rows = [self.rows[i] for i in keep]

    def extract(self, row: int) -> "RowAdapters":
        """The entry of one row alone."""
        return RowAdapters([self.rows[row]])

    def prepare(self, **_padding: object) -> None:
        """Do nothing, as at its end: padding changes no adapter."""

    finalize = prepare


class _Layout:
    """The stacks of a module: slots of like rank share one, at most twice as large as its own.

    Slots without an update, rank 0, have the place of slot 0, the first of the first stack.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.stacks, self.places, own = [[0]], dict[int, tuple[int, int]](), 0
        for rank, slot in sorted((rank, slot) for slot, rank in enumerate(ranks) if rank):
            own += rank
            if (len(self.stacks[-1]) + 1) * rank > 2 * own:
                self.stacks.append([])
                own = rank
            self.places[slot] = len(self.stacks) - 1, len(self.stacks[-1])
            self.stacks[-1].append(slot)
        self.widths = [ranks[slots[-1]] for slots in self.stacks]
        self.rank = sum(len(slots) * width for slots, width in zip(self.stacks, self.widths))
        # Modules share layouts, and a batch stays for many tokens.
        self.parts = lru_cache(maxsize=1)(self._parts)

    def _parts(self, slots: Sequence[int]) -> tuple[list[tuple[int, mx.array, mx.array]], mx.array]:
        """Rows of a batch and their indices by stack, and the order that makes them the batch."""
        places, parts = [self.places.get(slot, (0, 0)) for slot in slots], []
        for stack in sorted({stack for stack, _ in places}):
            rows = [row for row, place in enumerate(places) if place[0] == stack]
            parts.append((stack, mx.array(rows), mx.array([places[row][1] for row in rows])))
        return parts, mx.argsort(mx.concatenate([rows for _, rows, _ in parts]))


class _MixedLoRA(nn.Module):
    """`linear(x) + (x @ a) @ b`, each row with its own factors from `stacks`."""

    def __init__(self, linear: nn.Module, adapters: "Adapters", shape: tuple[int, int]) -> None:
        super().__init__()
        self.linear, self.adapters, self.layout = linear, adapters, _Layout([0])
        dtype = adapters.base.compute_dtype
        self.stacks = [(mx.zeros((1, shape[0], 0), dtype), mx.zeros((1, 0, shape[1]), dtype))]

    def __call__(self, x: mx.array) -> mx.array:
        y, slots = self.linear(x), self.adapters.slots
        if self.layout.places.keys().isdisjoint(slots):
            return y
        if len(slots) == 1:
            a, b = self.factors(slots[0])
            return y + ((x @ a[0]) @ b[0]).astype(y.dtype)
        (parts, order), updates = self.layout.parts(slots), []
        for stack, rows, indices in parts:
            a, b = self.stacks[stack]
            update = mx.gather_mm(x, a, rows, indices)
            updates.append(mx.gather_mm(update, b, rhs_indices=indices))
        update = updates[0] if len(updates) == 1 else mx.concatenate(updates)[order]
        return y + update.astype(y.dtype)

    def factors(self, slot: int) -> Pair:
        """The factors of a slot, or zeros, at the rank of their stack."""
        stack, i = self.layout.places.get(slot, (0, 0))
        a, b = self.stacks[stack]
        return a[i : i + 1], b[i : i + 1]

    def arrange(self, pairs: Sequence[Pair], layout: _Layout) -> None:
        """Stack the factors of all slots as a layout says."""
        stacks, none = [], (0, 0)
        for slots, width in zip(layout.stacks, layout.widths):
            cut = [(a[:, :, :width], b[:, :width]) for a, b in (pairs[slot] for slot in slots)]
            pads = [(0, width - a.shape[2]) for a, _ in cut]
            a = mx.concatenate([mx.pad(a, [none, none, pad]) for (a, _), pad in zip(cut, pads)])
            b = mx.concatenate([mx.pad(b, [none, pad, none]) for (_, b), pad in zip(cut, pads)])
            stacks.append((a, b))
        # Module by module: before the next, what this one had is free.
        mx.eval(stacks)
        self.stacks, self.layout = stacks, layout


class Adapters:
    """A base model with the adapters of a pack, and those that came later.

    Call it like an mlx-lm model, with caches made by `cache`. For one adapter at a time use
    `serve.load`, which needs less memory. One thread calls everything.

    Attributes:
        base: the model that it runs; its linear modules are replaced, so nothing else may use it.
        base_entry: that of rows without an adapter.
        names: name in a request -> entry. It is replaced, never changed: any thread may read it.
        memory: most bytes of adapters in memory. One fits whenever the device has room for it.
        slots: of the batch that runs: a single one for all rows, or one for each.
        n_loaded: adapters that were put into memory so far.
        n_evicted: those of them that had to leave it for others.
    """

    def __init__(self, base: Model, pack: Pack, memory: int) -> None:
        """Load all adapters of a pack, or none before it is asked for where not all fit.

        Raises:
            AdapterError: an adapter is not of this base, or larger than what the device has.
            PackError: an adapter cannot be read.
        """
        self.base, self.memory = base, memory
        self.slots: Sequence[int] = (0,)
        self.n_loaded = self.n_evicted = 0
        self.base_entry = Entry(pack.path, lambda: None, {}, 0)
        self._linears = dict(base.model.named_modules())
        self._modules: dict[str, _MixedLoRA] = {}
        self._numbers = count(1)
        # Those in memory, used longest ago first; some may not be served any more.
        self._seated: list[Entry] = []
        entries: dict[Any, Entry] = {}
        for key, (task, *_) in pack.adapters.items():
            path = pack.path if pack.storage == "compact" else pack.path / str(key)
            entries[key] = Entry(path, partial(pack.load, task))
        self.names: Mapping[str, Entry] = {
            task: entries.get(key, self.base_entry) for task, key in pack.tasks.items()
        }
        factors: dict[Entry, Factors] = {}
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

    def _read(self, entry: Entry) -> Factors:
        """The factors of an adapter by module, while nothing else of it is in memory."""
        adapter = entry.read()
        assert adapter is not None
        check_adapter(adapter, self.base.module_shapes, entry.path)
        entry.ranks = {path: lora.rank for path, lora in adapter.modules.items()}
        nbytes, most = self._nbytes_of([entry]), max(self.memory, evaluation_memory())
        if nbytes > most:
            entry.ranks = None
            sizes = f"{nbytes / 1e6:,.1f} MB of memory, and this device has {most / 1e6:,.1f} MB"
            raise AdapterError(f"{entry.path}: takes {sizes}; lower its rank")
        factors = {path: self.base.stacked_factors(path, [adapter]) for path in adapter.modules}
        mx.eval(list(factors.values()))
        return factors

    def _arrange(self, arriving: Mapping[Entry, Factors], leaving: Iterable[Entry] = ()) -> None:
        """Take adapters out of memory, and put others in, whose dictionaries are emptied."""
        for entry in leaving:
            self._seated.remove(entry)
            entry.slot = None
        for path in {path for factors in arriving.values() for path in factors} - {*self._modules}:
            shape = self.base.module_shapes[path]
            self._modules[path] = _MixedLoRA(self._linears[path], self, shape)
            self.base.model.update_modules(tree_unflatten([(path, self._modules[path])]))
        layouts = _layouts([*self._seated, *arriving])
        for path, module in self._modules.items():
            pairs = [module.factors(x.slot or 0) for x in (self.base_entry, *self._seated)]
            # Each is free once it was copied.
            pairs += [factors.pop(path, pairs[0]) for factors in arriving.values()]
            module.arrange(pairs, layouts.get(path, _Layout([0])))
        for entry in arriving:
            entry.number = next(self._numbers)
        self.n_loaded += len(arriving)
        self._seated += arriving
        for slot, entry in enumerate(self._seated, 1):
            entry.slot = slot

    def _nbytes_of(self, entries: Iterable[Entry]) -> int:
        """Bytes that adapters take together."""
        shapes, size = self.base.module_shapes, self.base.compute_dtype.size
        return size * sum(x.rank * sum(shapes[path]) for path, x in _layouts(entries).items())

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(x.nbytes for module in self._modules.values() for x in chain(*module.stacks))

    def cache(self, entry: Entry, layers: Sequence[Any] = ()) -> list[Any]:
        """A prompt cache for one sequence, which has what `layers` has; else it is empty."""
        return [*(layers or make_prompt_cache(self.base.model)), RowAdapters([entry])]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        """Logits `(rows, length, vocabulary)` of token ids `(rows, length)`."""
        *layers, rows = cache
        slots = tuple(entry.slot or 0 for entry in rows.rows)
        self.slots = slots[:1] if len(set(slots)) == 1 else slots
        try:
            return self.base.model(tokens, cache=layers)
        finally:
            # The router runs the inner model directly, as the base.
            self.slots = (0,)


def _layouts(entries: Iterable[Entry]) -> dict[str, _Layout]:
    """The layout of each module that adapters change; those of the same ranks share it."""
    ranks, layout = [entry.ranks or {} for entry in entries], cache(_Layout)
    paths = dict.fromkeys(path for own in ranks for path in own)
    return {path: layout((0, *(own.get(path, 0) for own in ranks))) for path in paths}
