"""The thread that generates: requests join a running batch at any time, and tokens stream out.

mlx-lm's `BatchGenerator` does the batching. The scheduler adds what a server needs around it:
routing of requests without a task, a limit to the queue, and clients that leave.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Condition, Thread
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences

from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.mixed_batch import Beginning
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.router import Router
from d2c_mlx.serve.text import TokenReader
from d2c_mlx.utils.device import current_device

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
    """One request on its way through the scheduler.

    Attributes:
        prompt: token ids.
        task: name of its adapter; None is the base model.
        max_tokens: of the answer.
        emit: called on the scheduler's thread with what happens, in order: `STARTED`, progress of
            the prompt as a tuple, pieces, and at the end None or an exception.
        stop_sequences: token ids that end an answer.
        sampler: mlx-lm's; None takes the most likely token.
        processors: mlx-lm's logits processors.
        stop_words: text that ends an answer, and is not part of it.
        router: chooses the task; None if it is given.
        routing_prompt: token ids by which it does.
        prompts: task -> `prompt` once the router has chosen it, where they differ by system
            message.
        scale: factor of the adapter's update; None is the adapter's own.
        n_top: number of likeliest tokens to tell with each.
        route: what the router found: the `nearest` task, its `similarity`, and the `threshold`
            below which the base model answers; None if it was not asked.
        n_cached: tokens of the prompt that another had processed, once the job runs.
        cancelled: set it when the client waits no more; the scheduler then drops the job.
        submitted: when the job was made, by `time.perf_counter`.
    """

    prompt: list[int]
    task: str | None
    max_tokens: int
    emit: Callable[[Any], None]
    stop_sequences: StopSequences
    sampler: Callable[[mx.array], mx.array] | None = None
    processors: Sequence[Any] = ()
    stop_words: Sequence[str] = ()
    router: Router | None = None
    routing_prompt: Sequence[int] = ()
    prompts: Mapping[str | None, list[int]] = field(default_factory=dict)
    scale: float | None = None
    n_top: int = 0
    route: dict[str, Any] | None = None
    n_cached: int = 0
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)


@dataclass(eq=False)
class _OpenJob:
    """A job that waits or runs, and since when it lacked room for its adapter."""

    job: Job
    entry: Entry | None
    lacks_room_since: float = 0.0
    beginning: Beginning = Beginning()
    reader: TokenReader | None = None
    # When the token before came, or the job.
    ticked: float = 0.0


class Scheduler:
    """Runs jobs of all tasks in one batch, on a thread of its own."""

    def __init__(self, adapters: Adapters, metrics: Metrics, batch: int, queue: int) -> None:
        """Start the thread.

        Args:
            adapters: on their base; used by the thread alone from now on.
            metrics: counts what happens.
            batch: jobs that run at a time.
            queue: jobs that wait.
        """
        self._adapters, self._metrics = adapters, metrics
        self._batch, self._max_open = batch, batch + queue
        self._inbox: Queue[Job | Callable[[], Any]] = Queue()
        self._waiting: list[_OpenJob] = []
        self._running: dict[int, _OpenJob] = {}
        self._open, self._changed = 0, Condition()
        self._draining = self._closing = False
        self._thread = Thread(target=self._run, name="d2c-mlx-scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True if jobs that were submitted may still end."""
        return self._thread.is_alive() and not self._closing

    @property
    def accepts(self) -> bool:
        """True if the scheduler takes jobs."""
        return self.alive and not self._draining

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none; their `emit` gets the answers.

        Raises:
            RequestError: (503) the queue is full, or the server stops.
        """
        with self._changed:
            if not self.accepts:
                raise RequestError(503, "the server stops")
            if self._open + len(jobs) > self._max_open:
                words = f"{self._open} requests run or wait already; try again later"
                raise RequestError(503, words)
            self._open += len(jobs)
            for job in jobs:
                self._inbox.put(job)
        self._metrics.open.set(self._open)

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
            if not self.accepts:
                raise RequestError(503, "the server stops")
            self._inbox.put(run)
        return done

    def drain(self, seconds: float) -> None:
        """Take no more jobs, and wait for those that are there for at most some seconds."""
        with self._changed:
            self._draining = True
            self._changed.wait_for(lambda: not self._open or not self.alive, seconds)

    def close(self) -> None:
        """Stop; jobs that run or wait end with an error."""
        with self._changed:
            self._closing = True
        self._thread.join()

    def _run(self) -> None:
        batch = self._new_batch()
        while not self._closing:
            try:
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
                # Close before there is another: each restores the memory limit that Metal wires.
                batch.close()
                batch = self._new_batch()
        self._end_all("the server stops")
        del batch
        # A thread that used MLX destroys its streams before it ends, or the process may abort at
        # its exit.
        mx.clear_streams()

    def _end_all(self, reason: str) -> None:
        """End every job with an error, and run what others wait for."""
        self._end_running(reason)
        for waiting in self._waiting:
            self._end(waiting.job, waiting.entry, RuntimeError(reason))
        self._waiting.clear()
        while not self._inbox.empty():
            item = self._inbox.get_nowait()
            if isinstance(item, Job):
                self._end(item, None, RuntimeError(reason))
            else:
                item()

    def _new_batch(self) -> BatchGenerator:
        return BatchGenerator(
            self._adapters.model,
            completion_batch_size=self._batch,
            prefill_batch_size=min(8, self._batch),
            prefill_step_size=_PREFILL_TOKENS,
            stream=mx.default_stream(current_device()),
        )

    def _read_inbox(self) -> None:
        """Take all that others sent; wait for something if nothing runs."""
        try:
            wait = None if self._running else _POLL_SECONDS
            item = self._inbox.get(block=not self._running, timeout=wait)
            while True:
                if isinstance(item, Job):
                    self._queue(item)
                else:
                    item()
                item = self._inbox.get_nowait()
        except Empty:
            pass

    def _queue(self, job: Job) -> None:
        """Choose the task of a job, and make it a user of its adapter."""
        try:
            if job.router:
                state = job.router.states(self._adapters.model.base.model, [job.routing_prompt])[0]
                (nearest,), match = job.router.matches(state), job.router.best(state)
                job.route = {
                    "nearest": nearest.task,
                    "similarity": round(nearest.similarity, 4),
                    "threshold": round(job.router.threshold, 4),
                }
                # A task that was unloaded is the base's.
                served = job.prompts.keys() & self._adapters.names.keys()
                job.task = match.task if match and match.task in served else None
                job.prompt = job.prompts[job.task]
            entry = None if job.task is None else self._adapters.acquire(job.task)
        except Exception as error:  # no request may end the others
            self._refuse(job, None, error)
            return
        self._waiting.append(_OpenJob(job, entry))
        self._tell()

    def _admit_waiting(self, batch: BatchGenerator) -> None:
        """Put jobs into the batch, oldest first, while it has room and their adapters are there."""
        now, left = time.perf_counter(), []
        waiting, self._waiting = self._waiting, []
        blocked = False
        for opened in waiting:
            full = blocked or len(self._running) >= self._batch
            try:
                if opened.job.cancelled:
                    self._end(opened.job, opened.entry)
                elif full or not self._is_ready(opened):
                    left.append(opened)
                else:
                    self._admit(batch, opened)
            except Exception as error:  # no request may end the others
                self._refuse(opened.job, opened.entry, error)
                continue
            if opened.lacks_room_since and now - opened.lacks_room_since > _PASSED_SECONDS:
                blocked = True
        self._waiting = left
        if len(left) != len(waiting):
            self._tell()

    def _tell(self) -> None:
        """Say who runs and who waits, for `/metrics`."""
        running, waiting = ([x.job.task for x in jobs] for jobs in
                            (self._running.values(), self._waiting))  # fmt: skip
        self._metrics.tell(running, waiting, len(self._adapters.names))

    def _is_ready(self, waiting: _OpenJob) -> bool:
        """True if the adapter of a job is in memory."""
        adapters, entry, task = self._adapters, waiting.entry, waiting.job.task
        if entry is None or task is None:
            return True
        if entry.seat is None and not adapters.is_served(entry):
            # Another was loaded in its place before it was.
            adapters.release(entry, task, False)
            waiting.entry = None
            waiting.entry = entry = adapters.acquire(task)
        if adapters.is_ready(entry, lambda: self._inbox.put(lambda: None)):
            return True
        # Only who is next holds up others: the one whose turn it is may be behind all the rest.
        if not adapters.lacks_room(entry):
            waiting.lacks_room_since = 0.0
        elif not waiting.lacks_room_since:
            waiting.lacks_room_since = time.perf_counter()
        return False

    def _admit(self, batch: BatchGenerator, waiting: _OpenJob) -> None:
        """Put a job into the batch."""
        job, entry, model = waiting.job, waiting.entry, self._adapters.model
        seat, scale = (entry.seat, entry.scale) if entry else (None, 1.0)
        seat, scale = seat or model.base_seat, scale if job.scale is None else job.scale
        begun = waiting.beginning = self._adapters.prefixes.find(seat, scale, job.prompt)
        job.n_cached, end = begun.n_kept, max(begun.n_kept, begun.n_shared)
        (uid,) = batch.insert_segments(
            [[job.prompt[job.n_cached : end], job.prompt[end:]]],
            max_tokens=[job.max_tokens],
            caches=[model.cache(seat, scale, begun.layers)],
            # Penalties look back into what is there already.
            all_tokens=[job.prompt[: job.n_cached]],
            samplers=[job.sampler],
            logits_processors=[list(job.processors)],
            stop_sequences=[job.stop_sequences],
        )
        if entry:
            self._adapters.begin(entry)
        waited = time.perf_counter() - job.submitted
        self._metrics.started(job.task, len(job.prompt), job.n_cached, waited)
        waiting.reader = TokenReader(model.base.tokenizer.detokenizer, job.stop_words, job.n_top)
        self._running[uid] = waiting
        job.emit(STARTED)

    def _step(self, batch: BatchGenerator) -> None:
        """Generate a token for every row, or a piece of the prompts; drop jobs that ended."""
        (prompts, tokens), reasons = batch.next(), dict[int, str]()
        for prompt in prompts:
            opened = self._running[prompt.uid]
            opened.job.emit(prompt.progress)
            if prompt.end_of_segment and opened.beginning.n_shared:
                self._adapters.prefixes.keep(opened.beginning, batch, prompt.uid)
                opened.beginning = Beginning()
        for token in tokens:
            opened, now = self._running[token.uid], time.perf_counter()
            assert opened.reader is not None
            first, seconds = not opened.ticked, now - (opened.ticked or opened.job.submitted)
            opened.ticked = now
            self._metrics.token(opened.job.task, seconds, first)
            opened.job.emit(opened.reader.add(token))
            if opened.reader.finish_reason:
                reasons[token.uid] = opened.reader.finish_reason
        over = [uid for uid, x in self._running.items() if uid in reasons or x.job.cancelled]
        batch.remove(over)
        ended = {uid: self._running.pop(uid) for uid in over}
        if ended:
            # Before anyone is told that they ended, who may then ask for the counts.
            self._tell()
        for uid, opened in ended.items():
            seconds = time.perf_counter() - opened.job.submitted
            self._metrics.ended(opened.job.task, reasons.get(uid, "abort"), seconds)
            self._end(opened.job, opened.entry, ran=True)

    def _end_running(self, reason: str) -> None:
        for opened in self._running.values():
            self._end(opened.job, opened.entry, RuntimeError(reason), ran=True)
        self._running.clear()

    def _refuse(self, job: Job, entry: Entry | None, error: Exception) -> None:
        """End a job that cannot start."""
        if not isinstance(error, RequestError):
            _log.error("a request could not be started", exc_info=error)
            error = RuntimeError("the request could not be started")
        self._end(job, entry, error)

    def _end(
        self, job: Job, entry: Entry | None, error: Exception | None = None, ran: bool = False
    ) -> None:
        if entry and job.task is not None:
            self._adapters.release(entry, job.task, ran)
        with self._changed:
            self._open -= 1
            self._changed.notify_all()
        self._metrics.open.set(self._open)
        job.emit(error)
