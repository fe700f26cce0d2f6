"""The thread that generates: requests join a running batch at any time, and tokens stream out.

mlx-lm's `BatchGenerator` does the batching. The scheduler adds what a server needs around it:
routing of requests without a task, a limit to the queue, and clients that leave.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Condition, Thread
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.jobs import STARTED, Job, Limits, RunningJob
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.prefixes import Beginning, Prefixes
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.utils.device import current_device

__all__ = ["Scheduler"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
# Seconds between two checks of whether the server stops while nothing is asked.
_POLL_SECONDS = 0.2
# Prompt tokens of one row that are processed between two steps of the others.
_PREFILL_TOKENS = 512
# A request that waits for room for its adapter is passed over by others for so long.
_PASSED_SECONDS = 2.0


@dataclass(eq=False)
class _WaitingJob:
    """A job that is not in the batch yet, and since when it lacked room for its adapter."""

    job: Job
    entry: Entry | None
    lacks_room_since: float = 0.0


class Scheduler:
    """Runs jobs of all tasks in one batch, on a thread of its own."""

    def __init__(self, adapters: Adapters, metrics: Metrics, limits: Limits) -> None:
        """Start the thread.

        Args:
            adapters: on their base; used by the thread alone from now on.
            metrics: counts what happens.
            limits: how many jobs may run and wait.
        """
        self._adapters, self._metrics = adapters, metrics
        self._batch, self._max_open = limits.batch, limits.batch + limits.queue
        self._inbox: Queue[Job | Callable[[], Any]] = Queue()
        self._waiting: list[_WaitingJob] = []
        self._running: dict[int, RunningJob] = {}
        self._prefixes = Prefixes(limits.prefix_nbytes)
        metrics.prefix_nbytes.set_function(lambda: self._prefixes.nbytes)
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
                raise RequestError(
                    503, f"{self._open} requests run or wait already; try again later"
                )
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
        self._adapters.attach(self._inbox.put, self._metrics, self._prefixes)
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
        self._stop()
        del batch
        # A thread that used MLX destroys its streams before it ends, or the process may abort at
        # its exit.
        mx.clear_streams()

    def _stop(self) -> None:
        """End every job with an error, and run what others wait for."""
        reason = "the server stops"
        self._end_running(reason)
        for one in self._waiting:
            self._end(one.job, one.entry, RuntimeError(reason))
        self._waiting.clear()
        while not self._inbox.empty():
            item = self._inbox.get_nowait()
            if isinstance(item, Job):
                self._end(item, None, RuntimeError(reason))
            else:
                item()

    def _new_batch(self) -> BatchGenerator:
        return BatchGenerator(
            self._adapters.model, completion_batch_size=self._batch,
            prefill_batch_size=min(8, self._batch), prefill_step_size=_PREFILL_TOKENS,
            stream=mx.default_stream(current_device()),
        )  # fmt: skip

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
                model = self._adapters.model.base.model
                state = job.router.states(model, [job.routing_prompt])[0]
                (found,), match = job.router.matches(state), job.router.best(state)
                job.route = {"nearest": found.task, "similarity": round(found.similarity, 4),
                             "threshold": round(job.router.threshold, 4)}  # fmt: skip
                # A task that was unloaded is the base's.
                known = match is not None and match.task in {*job.prompts} & {*self._adapters.names}
                job.task = match.task if match and known else None
                job.prompt = job.prompts[job.task]
            entry = None if job.task is None else self._adapters.acquire(job.task)
        except Exception as error:  # no request may end the others
            self._refuse(job, None, error)
            return
        self._waiting.append(_WaitingJob(job, entry))
        self._tell()

    def _admit_waiting(self, batch: BatchGenerator) -> None:
        """Put jobs into the batch, oldest first, while it has room and their adapters are there."""
        now, left = time.perf_counter(), []
        waiting, self._waiting = self._waiting, []
        blocked = False
        for one in waiting:
            full = blocked or len(self._running) >= self._batch
            try:
                if one.job.cancelled:
                    self._end(one.job, one.entry)
                elif full or not self._is_ready(one):
                    left.append(one)
                else:
                    self._admit(batch, one)
            except Exception as error:  # no request may end the others
                self._refuse(one.job, one.entry, error)
                continue
            if one.lacks_room_since and now - one.lacks_room_since > _PASSED_SECONDS:
                blocked = True
        changed = len(left) != len(waiting)
        self._waiting = left
        if changed:
            self._tell()

    def _tell(self) -> None:
        """Say who runs and who waits, for `/metrics`."""
        metrics, adapters = self._metrics, self._adapters
        metrics.running = tuple(metrics.name(one.job.task) for one in self._running.values())
        metrics.waiting = tuple(metrics.name(one.job.task) for one in self._waiting)
        metrics.most_adapters = min(adapters.most_in_memory(), len(adapters.names))

    def _is_ready(self, one: _WaitingJob) -> bool:
        adapters, entry = self._adapters, one.entry
        if entry is None:
            return True
        if entry.gone and entry.slot is None:
            # Another was loaded in its place before it was.
            assert one.job.task is not None
            adapters.release(entry, one.job.task, False)
            one.entry = None
            one.entry = entry = adapters.acquire(one.job.task)
        if adapters.is_ready(entry):
            return True
        # Only who is next holds up others: the one whose turn it is may be behind all the rest.
        if not adapters.lacks_room(entry):
            one.lacks_room_since = 0.0
        elif not one.lacks_room_since:
            one.lacks_room_since = time.perf_counter()
        return False

    def _admit(self, batch: BatchGenerator, one: _WaitingJob) -> None:
        job, entry, model = one.job, one.entry, self._adapters.model
        slot, own = (0, 1.0) if entry is None else (entry.slot or 0, entry.scale)
        scale = own if job.scale is None else job.scale
        begun = self._prefixes.find(entry.load if entry else 0, scale, job.prompt)
        job.n_cached, end = begun.n_kept, max(begun.n_kept, begun.n_shared)
        (uid,) = batch.insert_segments(
            [[job.prompt[job.n_cached : end], job.prompt[end:]]], max_tokens=[job.max_tokens],
            caches=[model.cache(slot, scale, begun.layers)], samplers=[job.sampler],
            # Penalties look back into what is there already.
            all_tokens=[job.prompt[: job.n_cached]],
            logits_processors=[list(job.processors)], stop_sequences=[job.stop_sequences],
        )  # fmt: skip
        if entry:
            self._adapters.begin(entry)
        waited = time.perf_counter() - job.submitted
        self._metrics.started(job.task, len(job.prompt), job.n_cached, waited)
        self._running[uid] = RunningJob(job, entry, begun, model.base.tokenizer.detokenizer)
        job.emit(STARTED)

    def _step(self, batch: BatchGenerator) -> None:
        """Generate a token for every row, or a piece of the prompts; drop jobs that ended."""
        running = self._running
        prompts, tokens = batch.next()
        for prompt in prompts:
            one = running[prompt.uid]
            one.job.emit(prompt.progress)
            if prompt.end_of_segment and one.begun.n_shared:
                self._prefixes.keep(one.begun, batch, prompt.uid)
                one.begun = Beginning()
        for token in tokens:
            one = running[token.uid]
            self._metrics.token(one.job.task, *one.tick())
            one.job.emit(one.add(token))
        over = [uid for uid, one in running.items() if one.finish_reason or one.job.cancelled]
        batch.remove(over)
        ended = [running.pop(uid) for uid in over]
        if ended:
            # Before anyone is told that they ended, who may then ask for the counts.
            self._tell()
        for one in ended:
            seconds = time.perf_counter() - one.job.submitted
            self._metrics.ended(one.job.task, one.finish_reason, seconds)
            self._end(one.job, one.entry, ran=True)

    def _end_running(self, reason: str) -> None:
        for one in self._running.values():
            self._end(one.job, one.entry, RuntimeError(reason), ran=True)
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
