"""The adapters that requests may name: which are in memory, who uses them, how they come and go.

The scheduler's thread reads an adapter, gives it a seat in memory and takes that away again,
between two tokens. What runs keeps what it began with: every load is an `Entry` of its own, which
leaves when it is no longer served and its last request has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.models.model import Model
from d2c_mlx.packs.pack import Pack
from d2c_mlx.serve.mixed_batch import Factors, MixedModel, Prefixes, Ranks, Seat, ranks_of

__all__ = ["Adapters", "Entry"]


@dataclass(eq=False)
class Entry:
    """One load of an adapter; another load, even of the same name, is another entry.

    Attributes:
        path: the directory or file it comes from.
        read: reads it; None if the base serves its tasks as it is.
        ranks: of its modules, once it was read.
        seat: in memory; None while it is not there.
        rows: requests that run with it.
    """

    path: Path
    read: Callable[[], Adapter | None]
    ranks: Ranks | None = None
    seat: Seat | None = None
    rows: int = 0


class Adapters:
    """The adapters of a pack and those that came later, on their base model.

    The scheduler's thread calls everything but `entries_of`.

    Attributes:
        model: the base with the adapters that are in memory.
        names: name in a request -> entry. It is replaced, never changed: any thread may read it.
        memory: most bytes of adapters in memory. One always fits.
        prefixes: what adapters in memory made of prompts.
        n_loaded: adapters that were put into memory so far.
        n_evicted: those of them that had to leave it for others.
    """

    def __init__(self, base: Model, pack: Pack, memory: int, prefixes: Prefixes) -> None:
        """Load all adapters of a pack, or none before it is asked for where not all fit.

        Args:
            base: the pack's base model without adapters; not to be used for anything else then.
            pack: verified.
            memory: most bytes of adapters in memory.
            prefixes: drops what adapters made that leave.

        Raises:
            AdapterError: an adapter is not of this base.
            PackError: an adapter cannot be read.
        """
        self.model, self.memory, self.prefixes = MixedModel(base), memory, prefixes
        self.n_loaded = self.n_evicted = 0
        self.names: Mapping[str, Entry] = self.entries_of(pack)
        # Those in memory, used longest ago first; some may not be served any more.
        self._seated: dict[Entry, Seat] = {}
        factors: dict[Entry, Factors] = {}
        for entry in dict.fromkeys(self.names.values()):
            if entry.seat is None:
                factors[entry] = self._read(entry)
            if self.model.nbytes_of([ranks_of(x) for x in factors.values()]) > memory:
                return
        self._arrange(factors, [])

    def entries_of(self, pack: Pack) -> dict[str, Entry]:
        """New entries for the tasks of a pack; tasks of one adapter share one. On any thread."""
        base = Entry(pack.path, lambda: None, seat=self.model.base_seat)
        entries: dict[Any, Entry] = {None: base}
        for key, (task, *_) in pack.adapters.items():
            path = pack.path if pack.storage == "compact" else pack.path / str(key)
            entries[key] = Entry(path, partial(pack.load, task))
        return {task: entries[key] for task, key in pack.tasks.items()}

    def begin(self, entry: Entry) -> None:
        """A request runs with an adapter now."""
        entry.rows += 1
        if entry in self._seated:
            self._seated[entry] = self._seated.pop(entry)

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
        if entry.seat is not None:
            return True
        factors = None
        if entry.ranks is None:
            factors = self._read(entry)
            entry.ranks = ranks_of(factors)
        left = {other: seat.ranks for other, seat in self._seated.items()}
        idle = [other for other in left if not other.rows]
        evicted: list[Entry] = []
        while left and self.model.nbytes_of([*left.values(), entry.ranks]) > self.memory:
            if not idle:
                return False
            evicted.append(idle.pop(0))
            del left[evicted[-1]]
        self._arrange({entry: factors or self._read(entry)}, evicted)
        self.n_evicted += len(evicted)
        return True

    def _read(self, entry: Entry) -> Factors:
        adapter = entry.read()
        if adapter is None:
            return {}
        check_adapter(adapter, self.model.base.module_shapes, entry.path)
        return self.model.factors(adapter)

    def _arrange(self, arriving: Mapping[Entry, Factors], leaving: Iterable[Entry]) -> None:
        """Take adapters out of memory, and put others in; one without factors is the base."""
        for entry in leaving:
            self.prefixes.drop(self._seated.pop(entry))
            entry.seat = None
        new = {entry: factors for entry, factors in arriving.items() if factors}
        seats = self.model.arrange([*self._seated.values()], [*new.values()])
        self._seated |= zip(new, seats)
        self.n_loaded += len(new)
        for entry in arriving:
            entry.seat = self._seated.get(entry, self.model.base_seat)
