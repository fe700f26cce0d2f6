"""Scheduling for the engine: worker threads, and what is kept between passes."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import Any, Generic, TypeVar

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.kernels import eager_evaluation
from d2c_mlx.utils.device import current_device, on_cpu
from d2c_mlx.utils.environment import limit_blas_threads, loaded_blas

V = TypeVar("V")
T = TypeVar("T")

Piece = tuple[Adapter | None, ExampleSet]
# Sets are evaluated in chunks of about this many tokens, and losses are stored after each.
CHUNK_TOKENS = 6144


class ByteCache(Generic[V]):
    """Values by key, within a number of bytes; the oldest go first."""

    def __init__(self, nbytes: int) -> None:
        """Make a cache for at most `nbytes`."""
        self._limit, self._lock = nbytes, threading.Lock()
        self._entries: dict[object, tuple[V, int]] = {}

    def get(self, key: object) -> V | None:
        """The value under `key`, or None if it is not there any more."""
        return self._entries.get(key, (None, 0))[0]

    def put(self, key: object, value: V, nbytes: int) -> None:
        """Keep a value in place of an earlier one, unless it alone is too large."""
        with self._lock:
            self._entries.pop(key, None)
            if nbytes <= self._limit:
                self._entries[key] = value, nbytes
            while sum(size for _, size in self._entries.values()) > self._limit:
                del self._entries[next(iter(self._entries))]


class _Stream:
    """A worker thread's own stream, which is destroyed when the thread ends.

    Only the thread itself can destroy it, and MLX may abort at the interpreter's exit if one is
    left (https://github.com/ml-explore/mlx/pull/4373).
    """

    def __init__(self, device: mx.Device) -> None:
        self.stream = mx.new_stream(device)

    def __del__(self) -> None:
        mx.clear_streams()


# At module level, to outlive every thread.
_thread = threading.local()


class Workers:
    """Threads that evaluate side by side, each on a stream of its own.

    `make_workers` chooses how many; `Workers(1)` is for a single thread.

    Attributes:
        n: number of threads; with one, the calling thread does the work, in chunks.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        device = current_device()
        self._pool = ThreadPoolExecutor(
            n, initializer=lambda: setattr(_thread, "stream", _Stream(device))
        )

    def run(
        self, body: Callable[[Sequence[Any]], Sequence[T]], sets: Sequence[Any]
    ) -> Iterator[tuple[int, T]]:
        """Run `body` over sets, the largest first where there are threads.

        Args:
            body: gives one result per set of those it is called with.
            sets: example sets or batches of one, whose `n_tokens` say what each costs.

        Yields:
            (index of a set, its result), each as soon as it is known.
        """
        if self.n == 1:
            chunk: list[int] = []
            for i in range(len(sets)):
                chunk.append(i)
                full = sum(sets[j].n_tokens for j in chunk) >= CHUNK_TOKENS
                if full or i == len(sets) - 1:
                    yield from zip(chunk, body([sets[j] for j in chunk]))
                    chunk = []
            return

        def work(examples: Any) -> T:  # noqa: ANN401
            with mx.stream(_thread.stream.stream), eager_evaluation():
                return body([examples])[0]

        order = sorted(range(len(sets)), key=lambda j: (-sets[j].n_tokens, j))
        futures = {self._pool.submit(work, sets[j]): j for j in order}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            # Those that run use the attached adapter, so no other may be attached before they end.
            for future in futures:
                future.cancel()
            wait(futures)


def make_workers(n_processes: int = 1) -> Workers:
    """Workers for this device: up to four threads on a CPU, else the calling thread alone.

    On a CPU MLX runs elementwise work on a single core, so sets are evaluated side by side, and
    OpenBLAS is held to a thread's share of the cores.

    Args:
        n_processes: number of processes that share this machine's cores.
    """
    n_cores = max(1, (os.cpu_count() or 1) // n_processes)
    n = min(n_cores, 4) if on_cpu() else 1
    if on_cpu() and not limit_blas_threads(n_cores // n) and loaded_blas():
        n = 1  # a BLAS that takes all cores for itself
    return Workers(n)
