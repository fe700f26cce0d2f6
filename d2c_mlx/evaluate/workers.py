"""What the engine evaluates together, in which order, and what it keeps meanwhile."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Protocol, TypeVar

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.kernels import paced
from d2c_mlx.utils.blas import limit_blas_threads, loaded_blas
from d2c_mlx.utils.grouping import alike

__all__ = ["LOT", "Kept", "Piece", "Work", "Workers", "groups", "lots", "workers_here"]


class Work(Protocol):
    """What a worker does at a time."""

    @property
    def n_tokens(self) -> int:
        """What it costs."""


S = TypeVar("S", bound=Work)
T = TypeVar("T")

Piece = tuple[Adapter | None, ExampleSet]
# Sets are evaluated in lots of about this many tokens: after each lot its losses are stored.
LOT = 6144


def groups(pieces: Sequence[Piece], stack: int) -> Iterator[list[list[int]]]:
    """Piece indices by adapter; up to `stack` adapters that want the same sets go together."""
    wanted = list(alike(one.digest if one else "base" for one, _ in pieces).values())
    for same in alike(tuple(pieces[i][1].digest for i in indices) for indices in wanted).values():
        group = [wanted[j] for j in same]
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


class Kept:
    """Hidden states within a number of bytes; the least recently used go first."""

    def __init__(self, nbytes: int) -> None:
        self._free = nbytes
        self._entries: OrderedDict[object, list[mx.array]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: object) -> list[mx.array] | None:
        """What was put under `key`, if it is still there."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: object, arrays: list[mx.array]) -> None:
        """Keep arrays, unless they alone are too large; others may have to go."""
        size = sum(x.nbytes for x in arrays)
        with self._lock:
            held = sum(x.nbytes for entry in self._entries.values() for x in entry)
            if size > self._free + held:
                return
            while size > self._free:
                _, old = self._entries.popitem(last=False)
                self._free += sum(x.nbytes for x in old)
            self._entries[key] = arrays
            self._free -= size


class _Own(threading.local):
    """What a worker thread has: a stream, which is destroyed when the thread ends.

    Only the thread itself can destroy it, and MLX may abort at the interpreter's exit if one is
    left (https://github.com/ml-explore/mlx/pull/4373). Of the module, to outlive every thread.
    """

    stream: _Stream


class _Stream:
    def __init__(self, device: mx.Device) -> None:
        self.stream = mx.new_stream(device)

    def __del__(self) -> None:
        mx.clear_streams()


_own = _Own()


class Workers:
    """Threads that evaluate side by side, each on a stream of its own.

    Attributes:
        n: how many; with one, the calling thread does the work, in lots.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        device = mx.default_device()
        self._pool = ThreadPoolExecutor(
            n, initializer=lambda: setattr(_own, "stream", _Stream(device))
        )

    def run(
        self, body: Callable[[Sequence[S]], Sequence[T]], sets: Sequence[S]
    ) -> Iterator[tuple[int, T]]:
        """Yield (index of a set, what `body` gives for it) as they come, the largest first."""
        if self.n == 1:
            for lot in lots([one.n_tokens for one in sets]):
                yield from zip(lot, body([sets[j] for j in lot]))
            return

        def work(one: S) -> T:
            with mx.stream(_own.stream.stream), paced():
                return body([one])[0]

        order = sorted(range(len(sets)), key=lambda j: (-sets[j].n_tokens, j))
        futures = {self._pool.submit(work, sets[j]): j for j in order}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # Those that run use the attached adapter: nobody may go on before they end.
            for future in futures:
                future.cancel()
            wait(futures)


def workers_here(several: bool, n_processes: int) -> Workers:
    """One thread per core on a CPU device, where MLX runs elementwise work on a single core.

    Then OpenBLAS is held to a thread's share of the cores.

    Args:
        several: more than one thread.
        n_processes: how many share this machine's cores.
    """
    if mx.default_device().type != mx.DeviceType.cpu:
        return Workers(1)
    n_cores = max(1, (os.cpu_count() or 1) // n_processes)
    n_workers = min(n_cores, 4) if several else 1
    if not limit_blas_threads(n_cores // n_workers) and loaded_blas():
        return Workers(1)  # a BLAS that takes all cores for itself
    return Workers(n_workers)
