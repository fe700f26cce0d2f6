"""The thread that generates: requests join a running batch at any time, and tokens stream out.

mlx-lm's `BatchGenerator` does the batching. The scheduler adds what a server needs around it:
a limit to the queue, adapters that come and go, and clients that leave.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Condition, Thread
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, make_stop_sequences
from mlx_lm.models.cache import LRUPromptCache

from d2c_mlx.serve.adapters import Adapters, Entry
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.utils.device import current_device
from d2c_mlx.utils.errors import InputError

_log = logging.getLogger(__name__)
# Seconds between two checks of whether the server stops while nothing is asked.
_POLL_SECONDS = 0.2
# Prompt tokens of one row that are processed between two steps of the others.
_PREFILL_TOKENS = 512
# The shortest prompts that are worth keeping, and most of them.
_LEAST_PREFIX, _MOST_PREFIXES = 16, 1 << 12
# A request that waits for room for its adapter is passed over by others for so long.
_PASSED_SECONDS = 2.0


@dataclass(eq=False)
class Job:
    """One request on its way through the scheduler: it waits, runs, and has ended.

    Attributes:
        prompt: token ids.
        task: name of its adapter; None is the base model.
        max_tokens: of the answer.
        emit: called on the scheduler's thread with what happens, in order: None when it is in the
            batch and with each piece of its prompt, every token as `Answer.add` takes it, and a
            `RequestError` if it fails.
        sampler: mlx-lm's; None takes the most likely token.
        processors: mlx-lm's logits processors.
        n_top: number of likeliest tokens to tell with each.
        route: what the router measured; None if it was not asked.
        n_cached: tokens of the prompt that another had processed, once the job runs.
        entry: the adapter that it runs with; None while it waits.
        passed_since: when its adapter had no room for the first time; 0 while it has.
        cancelled: the scheduler is to drop it.
    """

    prompt: list[int]
    task: str | None
    max_tokens: int
    emit: Callable[[Any], None]
    sampler: Callable[[mx.array], mx.array] | None = None
    processors: Sequence[Any] = ()
    n_top: int = 0
    route: dict[str, Any] | None = None
    n_cached: int = 0
    entry: Entry | None = None
    passed_since: float = 0.0
    cancelled: bool = False

    def cancel(self) -> None:
        """Have the scheduler drop the job: its client waits no more."""
        self.cancelled = True


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        batch: requests that run at a time.
        queue: requests that wait.
        body_nbytes: bytes of a request's body.
        max_tokens: tokens of an answer that a request may ask for.
        seconds: in which a whole request must come, and a client take a part of its answer.
        drain_seconds: in which requests that run may end when the server stops.
        adapter_nbytes: bytes of adapters in memory; None is half of what this device has for us.
        prefix_nbytes: bytes of keys and values of prompts that others may begin like; 0 keeps none.
    """

    batch: int = 16
    queue: int = 64
    body_nbytes: int = 1_000_000
    max_tokens: int = 2048
    seconds: float = 30.0
    drain_seconds: float = 10.0
    adapter_nbytes: int | None = None
    prefix_nbytes: int = 500_000_000


class Scheduler:
    """Runs jobs of all tasks in one batch, on a thread of its own.

    Attributes:
        n_open: jobs that run or wait.
        prefixes: keys and values of prompts, by the number of an adapter's entry.
    """

    def __init__(self, adapters: Adapters, limits: Limits) -> None:
        """Start the thread, which alone uses the adapters from now on."""
        self._adapters, self._limits = adapters, limits
        self.prefixes = LRUPromptCache(_MOST_PREFIXES, limits.prefix_nbytes)
        self._stop_sequences = make_stop_sequences(adapters.base.tokenizer)
        self._inbox: Queue[Callable[[], Any]] = Queue()
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

    def submit(self, job: Job) -> None:
        """Queue a job; its `emit` gets the answer.

        Raises:
            RequestError: (503) the queue is full, or the server stops.
        """
        with self._changed:
            if self.n_open >= self._limits.batch + self._limits.queue:
                words = f"{self.n_open} requests run or wait already; try again later"
                raise RequestError(503, words)
            self._send(lambda: self._waiting.append(job))
            self.n_open += 1

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Have the thread call a function between two tokens.

        Raises:
            RequestError: (503) the server stops.
        """
        done = Future[Any]()

        def run() -> None:
            try:
                done.set_result(function())
            except Exception as error:  # it is the caller's
                done.set_exception(error)

        with self._changed:
            self._send(run)
        return done

    def _send(self, item: Callable[[], Any]) -> None:
        if not self.accepts:
            raise RequestError(503, "the server stops")
        self._inbox.put(item)

    def close(self) -> None:
        """Stop: take no more jobs; those that do not end in `drain_seconds` end with an error."""
        with self._changed:
            self._draining = True
            alive, seconds = self._thread.is_alive, self._limits.drain_seconds
            self._changed.wait_for(lambda: not self.n_open or not alive(), seconds)
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        batch: BatchGenerator | None = None
        while not self._closing:
            batch = BatchGenerator(
                self._adapters,
                completion_batch_size=self._limits.batch,
                prefill_batch_size=min(8, self._limits.batch),
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
                for job in self._running.values():
                    self._end(job, f"generating failed ({type(error).__name__})")
                self._running.clear()
                # An exception while MLX traces a sampler leaves a placeholder as this thread's
                # random state; without a new seed everything sampled later would fail.
                mx.random.seed(time.time_ns())
            finally:
                # Before there is another: each restores the memory limit that Metal wires.
                batch.close()
        self._read_inbox()
        for job in [*self._running.values(), *self._waiting]:
            self._end(job, "the server stops")
        batch = None
        # A thread that used MLX destroys its streams before it ends, or the process may abort at
        # its exit.
        mx.clear_streams()

    def _read_inbox(self) -> None:
        """Take all that others sent; wait for something if nothing runs."""
        try:
            wait = None if self._running else _POLL_SECONDS
            self._inbox.get(block=not self._running, timeout=wait)()
            while True:
                self._inbox.get_nowait()()
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
            full = blocked or len(self._running) >= self._limits.batch
            try:
                entry = adapters.base_entry if job.task is None else adapters.names.get(job.task)
                if job.cancelled:
                    self._end(job)
                elif entry is None:
                    words = f"model: {str(job.task)[:80]!r} was unloaded"
                    self._end(job, RequestError(404, words, "model"))
                elif full:
                    self._waiting.append(job)
                elif not adapters.load(entry):
                    self._waiting.append(job)
                    job.passed_since = job.passed_since or time.perf_counter()
                    blocked = time.perf_counter() - job.passed_since > _PASSED_SECONDS
                else:
                    self._admit(batch, job, entry)
            except Exception as error:  # no request may end the others
                _log.error("a request could not be started", exc_info=error)
                why = error.problems[0] if isinstance(error, InputError) else "see the log"
                self._end(job, f"the request could not be started ({why})")

    def _admit(self, batch: BatchGenerator, job: Job, entry: Entry) -> None:
        """Put a job into the batch."""
        # The last token is processed in any case.
        *beginning, last = job.prompt
        layers, rest = self.prefixes.fetch_nearest_cache(entry.number, beginning)
        job.n_cached = len(beginning) - len(rest)
        (uid,) = batch.insert_segments(
            [[rest, [last]]],
            max_tokens=[job.max_tokens],
            caches=[self._adapters.cache(entry, layers)],
            # Penalties look back into what is there already.
            all_tokens=[job.prompt[: job.n_cached]],
            samplers=[job.sampler],
            logits_processors=[list(job.processors)],
            stop_sequences=[self._stop_sequences],
        )
        self._adapters.begin(entry)
        job.entry = entry
        self._running[uid] = job
        job.emit(None)

    def _step(self, batch: BatchGenerator) -> None:
        """Generate a token for every row, or a piece of the prompts; drop jobs that ended."""
        prompts, tokens = batch.next()
        for prompt in prompts:
            job = self._running[prompt.uid]
            job.emit(None)
            if prompt.end_of_segment and not prompt.end_of_prompt and job.entry:
                *layers, _ = batch.extract_cache([prompt.uid])[prompt.uid][0]
                nbytes = sum(layer.nbytes for layer in layers)
                if len(job.prompt) > _LEAST_PREFIX and nbytes <= self._limits.prefix_nbytes:
                    mx.eval([layer.state for layer in layers])
                    self.prefixes.insert_cache(job.entry.number, job.prompt[:-1], layers)
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
            job.emit((pairs, token.finish_reason))
            if token.finish_reason:
                ended.add(token.uid)
        batch.remove(list(ended))
        for uid in ended:
            self._end(self._running.pop(uid))

    def _end(self, job: Job, error: RequestError | str | None = None) -> None:
        if job.entry:
            self._adapters.end(job.entry)
        with self._changed:
            self.n_open -= 1
            self._changed.notify_all()
        if error:
            job.emit(RequestError(500, error) if isinstance(error, str) else error)
