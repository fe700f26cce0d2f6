"""The adapters that requests may name: which are in memory, who uses them, how they come and go.

An adapter is read on a thread of its own while others generate, one at a time. The scheduler's
thread alone then puts it into a slot and takes it out again, between two tokens. What a request
has begun with it keeps: every load is an entry of its own, and leaves when its last user has ended.
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
from d2c_mlx.serve.mixed_batch import Factors, MixedModel
from d2c_mlx.serve.prefixes import Prefixes
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.utils.errors import InputError

__all__ = ["Adapters", "Entry"]

_log = logging.getLogger(__name__)
_ids, _loads = itertools.count(), itertools.count(1)


@dataclass(eq=False)
class Entry:
    """One load of an adapter; another load, even of the same name, is another entry.

    Attributes:
        path: the directory or file it comes from.
        read: reads it; None if the base serves its tasks as it is.
        pinned: it stays in memory.
        scale: factor of its update, where a request names none.
        name: under which it is counted.
        id: unlike that of any other.
        slot: in `MixedModel` while it is in memory; 0 is the base.
        load: number of the load that put it there, unlike any other; 0 is the base.
        named: name -> requests by it that wait for the adapter or run with it.
        rows: requests that run with it.
        used: when a request last began with it, in begun requests.
        problem: why it could not be read.
        leaving: name that was unloaded -> done when the last request by it has ended.
        gone: no name is left.
    """

    path: Path
    read: Callable[[], Adapter | None]
    pinned: bool = False
    scale: float = 1.0
    name: str = ""
    id: int = field(default_factory=lambda: next(_ids))
    slot: int | None = None
    load: int = 0
    named: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    used: int = 0
    problem: str = ""
    leaving: dict[str, Future[None]] = field(default_factory=dict)
    gone: bool = False

    @property
    def users(self) -> int:
        """Requests that wait for it or run with it."""
        return self.named.total()


class Adapters:
    """The adapters of a pack and those that came later, on their base model.

    The scheduler's thread calls everything but what says otherwise.

    Attributes:
        model: the base with the adapters that are in memory.
        names: name in a request -> entry. It is replaced, never changed: any thread may read it.
        memory: most bytes of adapters in memory; None is no limit. One always fits.
        metrics: counts loads and evictions, and forgets names; None before `attach`.
        prefixes: what adapters in memory made of prompts; None before `attach`.
    """

    def __init__(self, base: BaseModel, pack: Pack, memory: int | None = None) -> None:
        """Load all adapters of a pack, or with a limit none before it is asked for.

        Args:
            base: the pack's base model without adapters; not to be used for anything else then.
            pack: verified.
            memory: most bytes of adapters in memory; None is no limit.

        Raises:
            AdapterError: an adapter is not of this base.
            PackError: an adapter cannot be read.
        """
        self.model, self.memory = MixedModel(base), memory
        self.names: Mapping[str, Entry] = self.entries_of(pack)
        # Slot -> who has it, those included that are no longer served and still in use.
        self._loaded: dict[int, Entry] = {}
        self.metrics: Metrics | None = None
        self.prefixes: Prefixes | None = None
        self._clock = itertools.count(1)
        self._loader: ThreadPoolExecutor | None = None
        self._starting = Lock()
        self._post: Callable[[Callable[[], None]], None] = lambda call: call()
        self._incoming: Entry | None = None
        self._factors: Factors | None = None
        if memory is None:
            entries = list(dict.fromkeys(self.names.values()))
            found = {one: self.read(one) for one in entries}
            slots = self.model.put([factors for factors in found.values() if factors])
            for one, factors in found.items():
                self._has(one, slots.pop(0) if factors else 0)

    def entries_of(self, pack: Pack) -> dict[str, Entry]:
        """New entries for the tasks of a pack; tasks of one adapter share one. On any thread."""
        bare = Entry(pack.path, lambda: None, slot=0)
        shared = {
            key: Entry(pack.path / str(key) if pack.storage != "compact" else pack.path,
                       partial(pack.load, tasks[0]), name=tasks[0])
            for key, tasks in pack.adapters.items()
        }  # fmt: skip
        return {task: bare if key is None else shared[key] for task, key in pack.tasks.items()}

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

    def attach(
        self, post: Callable[[Callable[[], None]], None], metrics: Metrics, prefixes: Prefixes
    ) -> None:
        """Begin: `post` has a function called on the scheduler's thread."""
        self._post, self._incoming, self._factors = post, None, None
        self.metrics, self.prefixes = metrics, prefixes
        for entry in self._loaded.values():
            metrics.loads.labels(entry.name).inc()

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
        entry.named[name] += 1
        entry.problem = ""
        return entry

    def begin(self, entry: Entry) -> None:
        """A user of an adapter runs now."""
        entry.rows += 1
        entry.used = next(self._clock)

    def release(self, entry: Entry, name: str, ran: bool) -> None:
        """A user has ended; an adapter that was unloaded leaves with its last one."""
        entry.named[name] -= 1
        entry.rows -= ran
        self._leave(entry)

    def is_ready(self, entry: Entry) -> bool:
        """True if an adapter is in memory; else it is being read, or waits for room.

        Raises:
            RequestError: (500) it cannot be read, or has no room beside what is pinned.
        """
        if entry.slot is not None:
            return True
        if entry.problem:
            raise RequestError(500, entry.problem)
        waits = self._incoming
        if waits and waits is not entry and self._factors is not None and not waits.users:
            # Whoever wanted it has left.
            waits = self._incoming = None
        if waits is None:
            self._incoming, self._factors = entry, None
            future = self.submit(partial(self.read, entry))
            future.add_done_callback(lambda done: self._post(partial(self._was_read, entry, done)))
            return False
        if waits is not entry or self._factors is None:
            return False
        placed = self.place(entry, self._factors)
        if placed or not any(one.rows for one in self._loaded.values()):
            self._incoming = None
        if not placed and self._incoming is None:
            raise RequestError(500, "the adapter has no room in memory beside those that are"
                                    " pinned; unload one of them")  # fmt: skip
        return placed

    def lacks_room(self, entry: Entry) -> bool:
        """True if an adapter was read and waits for room."""
        return self._incoming is entry and self._factors is not None

    def place(self, entry: Entry, factors: Factors) -> bool:
        """Put an adapter into memory, in place of those that were used longest ago.

        Returns:
            False if all that are there are in use or pinned.
        """
        if not factors:
            entry.slot = 0
            return True
        if self.memory is not None and not self._make_room(factors):
            return False
        self._has(entry, *self.model.put([factors]))
        return True

    def most_in_memory(self, factors: Factors | None = None) -> int:
        """Number of adapters that memory has room for, were this one among them."""
        if self.memory is None:
            return 1 << 30
        # The base has a slot, too.
        return max(1, self.memory // max(1, self.model.slot_nbytes(factors)) - 1)

    def add(self, name: str, entry: Entry, factors: Factors) -> None:
        """Serve an adapter that was read; the one of this name before leaves when it is not used.

        Raises:
            RequestError: (400) it is to be pinned, and there is no room.
        """
        if entry.pinned:
            # The one of this name leaves.
            before = self.names.get(name)
            pinned = sum(one.pinned for one in self._loaded.values() if one is not before)
            # One slot stays for all the others.
            if pinned + 1 >= self.most_in_memory(factors) or not self.place(entry, factors):
                raise RequestError(400, f"pinned: no room in memory beside {pinned} pinned adapters"
                                   " and those in use; load it without", "pinned")  # fmt: skip
        elif len(self._loaded) < self.most_in_memory(factors):
            self.place(entry, factors)
        self.replace({**self.names, name: entry})

    def remove(self, name: str) -> Future[None]:
        """Stop serving a name; the future is done when the last request by it has ended."""
        entry = self.names[name]
        done: Future[None] = Future()
        entry.leaving[name] = done
        self.replace({key: one for key, one in self.names.items() if key != name})
        return done

    def replace(self, names: Mapping[str, Entry]) -> None:
        """Serve these names instead of all others; what is left out leaves when it is not used."""
        before, self.names, served = self.names, names, {*names.values()}
        for name, entry in before.items():
            if names.get(name) is not entry:
                entry.leaving.setdefault(name, Future())
                entry.gone = entry not in served
        for entry in {*before.values()}:
            self._leave(entry)

    def _has(self, entry: Entry, slot: int) -> None:
        entry.slot = slot
        if slot:
            # The file may have changed since it was read before.
            self._loaded[slot], entry.load = entry, next(_loads)
            if self.metrics and not entry.gone:
                self.metrics.loads.labels(entry.name).inc()

    def _free(self, entry: Entry) -> None:
        if entry.slot:
            self.model.free(entry.slot)
            del self._loaded[entry.slot]
            if self.prefixes:
                self.prefixes.drop(entry.load)
        entry.slot = None

    def _leave(self, entry: Entry) -> None:
        over = [name for name in entry.leaving if not entry.named[name]]
        if entry.gone and not entry.users:
            self._free(entry)
            self._forget(entry.name)
        for name in over:
            # Not before: its last requests are counted after it was unloaded.
            self._forget(name)
            entry.leaving.pop(name).set_result(None)

    def _forget(self, name: str) -> None:
        # Without a name requests are counted for the base model, which stays.
        if self.metrics and name and name not in self.names:
            self.metrics.forget(name)

    def _make_room(self, factors: Factors) -> bool:
        """Have a slot free for an adapter, and no others than memory has room for beside it."""
        while len(self._loaded) >= self.most_in_memory(factors):
            idle = [one for one in self._loaded.values() if not (one.rows or one.pinned)]
            if not idle:
                return False
            last = min(idle, key=lambda one: one.used)
            self._free(last)
            if self.metrics and not last.gone:
                self.metrics.evictions.labels(last.name).inc()
        most = self.most_in_memory(factors)
        for slot, entry in [*self._loaded.items()]:
            if slot > most and entry.rows:
                return False
            if slot > most:
                # A wider adapter makes all slots wider, so there may be fewer.
                del self._loaded[slot]
                entry.slot = self.model.move(slot)
                self._loaded[entry.slot] = entry
        self.model.trim(most)
        return True

    def _was_read(self, entry: Entry, done: Future[Factors]) -> None:
        if self._incoming is not entry:
            return
        try:
            self._factors = done.result()
        except Exception as error:  # a file may have become anything
            _log.warning("%s: an adapter could not be loaded", entry.path, exc_info=True)
            words = str(error).splitlines()[0] if isinstance(error, InputError) else ""
            entry.problem = f"the adapter cannot be loaded ({words or type(error).__name__})"
            self._incoming = None
