"""The thread that generates: requests join a running batch at any time, and tokens stream out.

mlx-lm's `BatchGenerator` does the batching. The scheduler adds what a server needs around it:
a limit to the queue, adapters that come and go, and clients that leave.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Condition, Thread
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences

from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.mixed_batch import Beginning
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.text import Token
from d2c_mlx.utils.device import current_device
from d2c_mlx.utils.errors import InputError

__all__ = ["STARTED", "Job", "Scheduler"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
# The event that says that a job is in the batch, and its task chosen.
STARTED = "started"
# Seconds between two checks of whether the server stops while nothing is asked.
_POLL_SECONDS = 0.2
# Prompt tokens of one row that are processed between two steps of the others.
_PREFILL_TOKENS = 512
# A request that waits for room for its adapter is passed over by others for so long.
_PASSED_SECONDS = 2.0


@dataclass(eq=False)
class Job:
    """One request on its way through the scheduler: it waits, runs, and has ended.

    Attributes:
        prompt: token ids.
        task: name of its adapter; None is the base model.
        max_tokens: of the answer.
        emit: called on the scheduler's thread with what happens, in order: `STARTED`, progress of
            the prompt as a tuple, every `Token`, and an exception if it fails.
        stop_sequences: token ids that end an answer.
        sampler: mlx-lm's; None takes the most likely token.
        processors: mlx-lm's logits processors.
        n_top: number of likeliest tokens to tell with each.
        route: what the router measured; None if it was not asked.
        n_cached: tokens of the prompt that another had processed, once the job runs.
        passed_since: when its adapter had no room for the first time; 0 while it has.
        cancelled: set it when the client waits no more; the scheduler then drops the job.
        entry: the adapter that it runs with; None while it waits, and for the base model.
        beginning: of its prompt that is to be kept for others.
    """

    prompt: list[int]
    task: str | None
    max_tokens: int
    emit: Callable[[Any], None]
    stop_sequences: StopSequences
    sampler: Callable[[mx.array], mx.array] | None = None
    processors: Sequence[Any] = ()
    n_top: int = 0
    route: dict[str, Any] | None = None
    n_cached: int = 0
    passed_since: float = 0.0
    cancelled: bool = False
    entry: Entry | None = None
    beginning: Beginning = Beginning()


class Scheduler:
    """Runs jobs of all tasks in one batch, on a thread of its own.

    Attributes:
        n_open: jobs that run or wait.
    """

    def __init__(self, adapters: Adapters, batch: int, queue: int) -> None:
        """Start the thread.

        Args:
            adapters: on their base; used by the thread alone from now on.
            batch: jobs that run at a time.
            queue: jobs that wait.
        """
        self._adapters, self._batch, self._max_open = adapters, batch, batch + queue
        self._inbox: Queue[Job | Callable[[], Any]] = Queue()
        self._waiting: list[Job] = []
        self._running: dict[int, Job] = {}
        self.n_open, self._changed = 0, Condition()
        self._draining = self._closing = False
        self._thread = Thread(target=self._run, name="d2c-mlx-scheduler", daemon=True)
        self._thread.start()

    @property
    def accepts(self) -> bool:
        """True if the scheduler takes jobs."""
        return self._thread.is_alive() and not self._draining

    def check_room(self) -> None:
        """Check that one more job may be queued; raises RequestError (503)."""
        if self.n_open >= self._max_open:
            words = f"{self.n_open} requests run or wait already; try again later"
            raise RequestError(503, words)

    def submit(self, job: Job) -> None:
        """Queue a job; its `emit` gets the answer.

        Raises:
            RequestError: (503) the queue is full, or the server stops.
        """
        with self._changed:
            self.check_room()
            self._send(job)
            self.n_open += 1

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have the thread call a function between two tokens.

        Raises:
            RequestError: (503) the server stops.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as error:  # it is the caller's
                done.set_exception(error)

        with self._changed:
            self._send(run)
        return done

    def _send(self, item: Job | Callable[[], Any]) -> None:
        if not self.accepts:
            raise RequestError(503, "the server stops")
        self._inbox.put(item)

    def close(self, seconds: float = 0.0) -> None:
        """Stop: take no more jobs; those that do not end in some seconds end with an error."""
        with self._changed:
            self._draining = True
            alive = self._thread.is_alive
            self._changed.wait_for(lambda: not self.n_open or not alive(), seconds)
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        batch: BatchGenerator | None = None
        while not self._closing:
            batch = BatchGenerator(
                self._adapters.model,
                completion_batch_size=self._batch,
                prefill_batch_size=min(8, self._batch),
                prefill_step_size=_PREFILL_TOKENS,
                stream=mx.default_stream(current_device()),
            )
            try:
                while not self._closing:
                    self._read_inbox()
                    self._admit_waiting(batch)
                    if self._running:
                        self._step(batch)
            except Exception as error:  # no request may end the server
                _log.exception("a batch of %d requests failed", len(self._running))
                self._end_running(f"generating failed ({type(error).__name__})")
                # An exception while MLX traces a sampler leaves a placeholder as this thread's
                # random state; without a new seed everything sampled later would fail.
                mx.random.seed(time.time_ns())
            finally:
                # Before there is another: each restores the memory limit that Metal wires.
                batch.close()
        self._end_running("the server stops")
        while not self._inbox.empty():
            item = self._inbox.get_nowait()
            if isinstance(item, Job):
                self._waiting.append(item)
            else:
                item()
        for job in self._waiting:
            self._end(job, RuntimeError("the server stops"))
        batch = None
        # A thread that used MLX destroys its streams before it ends, or the process may abort at
        # its exit.
        mx.clear_streams()

    def _read_inbox(self) -> None:
        """Take all that others sent; wait for something if nothing runs."""
        try:
            wait = None if self._running else _POLL_SECONDS
            item = self._inbox.get(block=not self._running, timeout=wait)
            while True:
                if isinstance(item, Job):
                    self._waiting.append(item)
                else:
                    item()
                item = self._inbox.get_nowait()
        except Empty:
            pass

    def _admit_waiting(self, batch: BatchGenerator) -> None:
        """Put jobs into the batch, oldest first, while it has room and their adapters are there.

        A job keeps the adapter that its name stands for then; while it waited that may have
        changed.
        """
        waiting, self._waiting = self._waiting, []
        adapters, blocked = self._adapters, False
        for job in waiting:
            full = blocked or len(self._running) >= self._batch
            try:
                entry = None if job.task is None else adapters.names.get(job.task)
                if job.cancelled:
                    self._end(job)
                elif entry is None and job.task is not None:
                    words = f"model: {job.task[:80]!r} was unloaded"
                    raise RequestError(404, words, "model")
                elif full:
                    self._waiting.append(job)
                elif entry and not adapters.load(entry):
                    self._waiting.append(job)
                    job.passed_since = job.passed_since or time.perf_counter()
                    blocked = time.perf_counter() - job.passed_since > _PASSED_SECONDS
                else:
                    self._admit(batch, job, entry)
            except Exception as error:  # no request may end the others
                if not isinstance(error, RequestError):
                    _log.error("a request could not be started", exc_info=error)
                    why = error.problems[0] if isinstance(error, InputError) else "see the log"
                    error = RuntimeError(f"the request could not be started ({why})")
                self._end(job, error)

    def _admit(self, batch: BatchGenerator, job: Job, entry: Entry | None) -> None:
        """Put a job into the batch."""
        model = self._adapters.model
        seat = (entry and entry.seat) or model.base_seat
        job.beginning = begun = self._adapters.prefixes.find(seat, job.prompt)
        job.n_cached, end = begun.n_kept, max(begun.n_kept, begun.n_shared)
        (uid,) = batch.insert_segments(
            [[job.prompt[job.n_cached : end], job.prompt[end:]]],
            max_tokens=[job.max_tokens],
            caches=[model.cache(seat, begun.layers)],
            # Penalties look back into what is there already.
            all_tokens=[job.prompt[: job.n_cached]],
            samplers=[job.sampler],
            logits_processors=[list(job.processors)],
            stop_sequences=[job.stop_sequences],
        )
        if entry:
            self._adapters.begin(entry)
        job.entry = entry
        self._running[uid] = job
        job.emit(STARTED)

    def _step(self, batch: BatchGenerator) -> None:
        """Generate a token for every row, or a piece of the prompts; drop jobs that ended."""
        prompts, tokens = batch.next()
        for prompt in prompts:
            job = self._running[prompt.uid]
            job.emit(prompt.progress)
            if prompt.end_of_segment and job.beginning.n_shared:
                cache = batch.extract_cache([prompt.uid])[prompt.uid][0]
                self._adapters.prefixes.keep(job.beginning, cache)
                job.beginning = Beginning()
        ended = {uid for uid, job in self._running.items() if job.cancelled}
        for token in tokens:
            job, values = self._running[token.uid], token.logprobs
            pairs = [(token.token, float(values[token.token].item()))]
            if job.n_top > 0:
                likely = mx.argpartition(-values, kth=job.n_top - 1)[: job.n_top]
                columns: Any = likely.tolist(), values[likely].tolist()
                # A token that a grammar forbids has -inf, and JSON has no such number.
                allowed = [pair for pair in zip(*columns) if pair[1] > -math.inf]
                pairs += sorted(allowed, key=lambda pair: -pair[1])
            job.emit(Token(pairs, token.finish_reason))
            if token.finish_reason:
                ended.add(token.uid)
        batch.remove(list(ended))
        for uid in ended:
            self._end(self._running.pop(uid))

    def _end_running(self, reason: str) -> None:
        for job in self._running.values():
            self._end(job, RuntimeError(reason))
        self._running.clear()

    def _end(self, job: Job, error: Exception | None = None) -> None:
        if job.entry:
            self._adapters.end(job.entry)
        with self._changed:
            self.n_open -= 1
            self._changed.notify_all()
        if error:
            job.emit(error)
