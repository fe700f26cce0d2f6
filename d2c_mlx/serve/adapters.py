"""The adapters that requests may name: which are in memory, who uses them, how they come and go.

An adapter is read on a thread of its own while others generate, one at a time. The scheduler's
thread alone then gives it a seat in memory and takes that away again, between two tokens. What a
request has begun with it keeps: every load is an `Entry` of its own, and leaves when its last user
has ended.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.packs.pack import Pack
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.mixed_batch import Factors, MixedModel, Prefixes, Seat, ranks_of
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.utils.errors import InputError

__all__ = ["Adapters", "Entry"]

_log = logging.getLogger(__name__)
_ids = itertools.count()


@dataclass(eq=False)
class Entry:
    """One load of an adapter; another load, even of the same name, is another entry.

    Attributes:
        name: under which it is counted.
        path: the directory or file it comes from.
        read: reads it; None if the base serves its tasks as it is.
        pinned: it stays in memory.
        scale: factor of its update, where a request names none.
        id: unlike that of any other.
        seat: in memory; None while it is not there.
        users: name -> requests by it that wait for the adapter or run with it.
        rows: requests that run with it.
    """

    name: str
    path: Path
    read: Callable[[], Adapter | None]
    pinned: bool = False
    scale: float = 1.0
    id: int = field(default_factory=lambda: next(_ids))
    seat: Seat | None = None
    users: Counter[str] = field(default_factory=Counter)
    rows: int = 0


class Adapters:
    """The adapters of a pack and those that came later, on their base model.

    The scheduler's thread calls everything but what says otherwise.

    Attributes:
        model: the base with the adapters that are in memory.
        names: name in a request -> entry. It is replaced, never changed: any thread may read it.
        memory: most bytes of adapters in memory. One always fits.
        prefixes: what adapters in memory made of prompts.
    """

    def __init__(
        self, base: BaseModel, pack: Pack, memory: int, metrics: Metrics, prefixes: Prefixes
    ) -> None:
        """Load all adapters of a pack, or none before it is asked for where not all fit.

        Args:
            base: the pack's base model without adapters; not to be used for anything else then.
            pack: verified.
            memory: most bytes of adapters in memory.
            metrics: counts loads and evictions, and forgets names.
            prefixes: drops what adapters made that leave.

        Raises:
            AdapterError: an adapter is not of this base.
            PackError: an adapter cannot be read.
        """
        self.model, self.memory = MixedModel(base), memory
        self._metrics, self.prefixes = metrics, prefixes
        self.names: Mapping[str, Entry] = self.entries_of(pack)
        # Those in memory, used longest ago first; some may not be served any more.
        self._seated: dict[Entry, Seat] = {}
        # Names that were unloaded and have users -> who is told when these have ended.
        self._leaving: list[tuple[str, Entry, Future[None]]] = []
        self._incoming: tuple[Entry, Future[Factors]] | None = None
        self._loader: ThreadPoolExecutor | None = None
        self._starting = Lock()
        factors: dict[Entry, Factors] = {}
        for entry in dict.fromkeys(self.names.values()):
            if entry.seat is None:
                factors[entry] = self.read(entry)
            if self.model.nbytes_of([ranks_of(x) for x in factors.values()]) > memory:
                return
        self._seat(factors, [])

    def entries_of(self, pack: Pack) -> dict[str, Entry]:
        """New entries for the tasks of a pack; tasks of one adapter share one. On any thread."""
        bare = Entry("", pack.path, lambda: None, seat=self.model.base_seat)
        entries: dict[Any, Entry] = {None: bare}
        for key, (task, *_) in pack.adapters.items():
            path = pack.path if pack.storage == "compact" else pack.path / str(key)
            entries[key] = Entry(task, path, partial(pack.load, task))
        return {task: entries[key] for task, key in pack.tasks.items()}

    def read(self, entry: Entry) -> Factors:
        """Read the factors of an adapter; none if it is the base. On any thread.

        Raises:
            InputError: it cannot be read, or is of another base.
        """
        adapter = entry.read()
        if adapter is None:
            return {}
        check_adapter(adapter, self.model.base.module_shapes, entry.path)
        return self.model.factors(adapter)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Have the loader's thread call a function, after all others. On any thread."""
        with self._starting:
            self._loader = self._loader or ThreadPoolExecutor(1, "d2c-mlx-loader")
        return self._loader.submit(call)

    def close(self) -> None:
        """Have the loader's thread end; another `submit` would start it again."""
        with self._starting:
            loader, self._loader = self._loader, None
        if loader:
            # A thread that used MLX destroys its streams before it ends.
            loader.submit(mx.clear_streams)
            loader.shutdown()

    def acquire(self, name: str) -> Entry:
        """Make a request a user of an adapter; raises RequestError (404) if there is none."""
        entry = self.names.get(name)
        if entry is None:
            raise RequestError(404, f"model: {name[:80]!r} was unloaded", "model")
        entry.users[name] += 1
        return entry

    def begin(self, entry: Entry) -> None:
        """A user of an adapter runs now."""
        entry.rows += 1
        if entry in self._seated:
            self._seated[entry] = self._seated.pop(entry)

    def release(self, entry: Entry, name: str, ran: bool) -> None:
        """A user has ended; an adapter that was unloaded leaves with its last one."""
        entry.users[name] -= 1
        entry.rows -= ran
        self._let_go()

    def is_ready(self, entry: Entry, wake: Callable[[], None]) -> bool:
        """True if an adapter is in memory; else it is being read, or waits for room.

        Args:
            entry: the adapter.
            wake: is called, on another thread, as soon as it was read.

        Raises:
            RequestError: (500) it cannot be read, or has no room beside what is pinned.
        """
        if entry.seat is not None:
            return True
        if self._incoming and self._incoming[1].done() and not self._incoming[0].users.total():
            # Whoever wanted it has left.
            self._incoming = None
        if self._incoming is None:
            self._incoming = entry, self.submit(partial(self.read, entry))
            self._incoming[1].add_done_callback(lambda _: wake())
        if not self.lacks_room(entry):
            return False
        factors = self._incoming[1]
        try:
            placed = self._place(entry, factors.result())
        except Exception as error:  # a file may have become anything
            self._incoming = None
            _log.warning("%s: an adapter could not be loaded", entry.path, exc_info=True)
            why = str(error).splitlines()[0] if isinstance(error, InputError) else ""
            words = f"the adapter cannot be loaded ({why or type(error).__name__})"
            raise RequestError(500, words) from None
        if placed or not any(other.rows for other in self._seated):
            self._incoming = None
        if not placed and self._incoming is None:
            words = "the adapter has no room in memory beside those that are pinned"
            raise RequestError(500, f"{words}; unload one of them")
        return placed

    def lacks_room(self, entry: Entry) -> bool:
        """True if an adapter was read and waits for room."""
        return bool(self._incoming and self._incoming[0] is entry and self._incoming[1].done())

    def add(self, name: str, entry: Entry, factors: Factors) -> None:
        """Serve an adapter that was read; the one of this name before leaves when it is not used.

        Raises:
            RequestError: (400) it is to be pinned, and there is no room.
        """
        # The one of this name leaves.
        others = [other for other in self._seated if other is not self.names.get(name)]
        ranks = ranks_of(factors)
        if entry.pinned:
            pinned = [self._seated[other].ranks for other in others if other.pinned]
            # One slot stays for all the others.
            room = self.model.nbytes_of([*pinned, ranks, ranks]) <= self.memory
            if not room or not self._place(entry, factors):
                words = f"pinned: no room in memory beside {len(pinned)} pinned adapters"
                raise RequestError(400, f"{words} and those in use; load it without", "pinned")
        elif self.nbytes_with(ranks) <= self.memory:
            self._place(entry, factors)
        self.replace({**self.names, name: entry})

    def remove(self, name: str) -> Future[None]:
        """Stop serving a name; the future is done when the last request by it has ended."""
        done: Future[None] = Future()
        self._leaving.append((name, self.names[name], done))
        self.replace({key: entry for key, entry in self.names.items() if key != name})
        return done

    def replace(self, names: Mapping[str, Entry]) -> None:
        """Serve these names instead of all others; what is left out leaves when it is not used."""
        before, self.names = self.names, names
        told = {(name, entry) for name, entry, _ in self._leaving}
        for name, entry in before.items():
            if names.get(name) is not entry and (name, entry) not in told:
                self._leaving.append((name, entry, Future()))
        self._let_go()

    def is_served(self, entry: Entry) -> bool:
        """True if a name leads to it."""
        return any(other is entry for other in self.names.values())

    def nbytes_with(self, *ranks: Mapping[str, int]) -> int:
        """Bytes of all that are in memory, and of more adapters of these ranks beside them."""
        return self.model.nbytes_of([*(seat.ranks for seat in self._seated.values()), *ranks])

    def _let_go(self) -> None:
        """Take out of memory, and forget, what was unloaded and nobody uses any more."""
        waiting = []
        for name, entry, done in self._leaving:
            if entry.users[name]:
                waiting.append((name, entry, done))
                continue
            if not self.is_served(entry) and not entry.users.total():
                self._seat({}, [entry])
                self._forget(entry.name)
            # Not before: its last requests are counted after it was unloaded.
            self._forget(name)
            done.set_result(None)
        self._leaving = waiting

    def _forget(self, name: str) -> None:
        # Without a name requests are counted for the base model, which stays.
        if name and name not in self.names:
            self._metrics.forget(name)

    def _place(self, entry: Entry, factors: Factors) -> bool:
        """Put an adapter into memory, in place of those that were used longest ago.

        Returns:
            False if all that are there are in use or pinned.
        """
        left = {other: seat.ranks for other, seat in self._seated.items()}
        idle = [other for other in left if not (other.rows or other.pinned)]
        evicted: list[Entry] = []
        while left and self.model.nbytes_of([*left.values(), ranks_of(factors)]) > self.memory:
            if not idle:
                return False
            evicted.append(idle.pop(0))
            del left[evicted[-1]]
        self._seat({entry: factors}, evicted)
        for other in evicted:
            if self.is_served(other):
                self._metrics.evictions.labels(other.name).inc()
        return True

    def _seat(self, arriving: Mapping[Entry, Factors], leaving: list[Entry]) -> None:
        """Take adapters out of memory, and put others in."""
        gone = [entry for entry in leaving if entry in self._seated]
        for entry in gone:
            self.prefixes.drop(self._seated.pop(entry))
            entry.seat = None
        new = {entry: factors for entry, factors in arriving.items() if factors}
        for entry in arriving.keys() - new.keys():
            entry.seat = self.model.base_seat
        if not (new or gone):
            return
        unloaded = {entry for _, entry, _ in self._leaving if not self.is_served(entry)}
        seats = self.model.arrange([*self._seated.values()], [*new.values()])
        for entry, entry.seat in zip(new, seats):
            self._seated[entry] = entry.seat
            if entry not in unloaded:
                self._metrics.loads.labels(entry.name).inc()
