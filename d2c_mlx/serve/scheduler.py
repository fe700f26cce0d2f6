"""The thread that generates: requests join a running batch at any time, and tokens stream out.

mlx-lm's `BatchGenerator` does the batching. The scheduler adds what a server needs around it:
routing of requests without a task, a limit to the queue, and clients that leave.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Condition, Thread
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences

from d2c_mlx.serve.api import RequestError
from d2c_mlx.serve.metrics import Metrics
from d2c_mlx.serve.mixed_batch import MixedModel
from d2c_mlx.serve.router import Router
from d2c_mlx.utils.device import current_device

__all__ = ["STARTED", "Job", "Piece", "Scheduler"]

_log = logging.getLogger(__name__)
# Seconds between two checks of whether the server stops while nothing is asked.
_POLL_SECONDS = 0.2
# Prompt tokens of one row that are processed between two steps of the others.
_PREFILL_TOKENS = 512
# The event that says that a job is in the batch, and its task chosen.
STARTED = "started"


@dataclass(frozen=True)
class Piece:
    """What one generated token adds to an answer.

    Attributes:
        text: that is certain now; "" while a stop word may have begun.
        token: its id.
        logprob: its log-probability in nats.
        finish_reason: "stop" or "length" with the last one.
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None


@dataclass(eq=False)
class Job:
    """One request on its way through the scheduler.

    Attributes:
        prompt: token ids.
        task: of the pack; None is the base model.
        max_tokens: of the answer.
        emit: called on the scheduler's thread with what happens, in order: `STARTED`, progress of
            the prompt as a tuple, pieces, and at the end None or an exception.
        stop_sequences: token ids that end an answer.
        sampler: mlx-lm's; None takes the most likely token.
        processors: mlx-lm's logits processors.
        stop_words: text that ends an answer, and is not part of it.
        routing_prompt: token ids by which the router chooses the task; None if it is given.
        route: what the router found: the `nearest` task, its `similarity`, and the `threshold`
            below which the base model answers; None if it was not asked.
        prompts: task -> `prompt` once the router has chosen it, where they differ by system
            message.
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
    routing_prompt: list[int] | None = None
    prompts: Mapping[str | None, list[int]] = field(default_factory=dict)
    route: dict[str, Any] | None = None
    cancelled: bool = False
    submitted: float = field(default_factory=time.perf_counter)


class _RunningJob:
    """A job in the batch, with its tokens as text.

    It looks for stop words in the text: mlx-lm's generator finds one only if its tokens are those
    of the word alone.
    """

    def __init__(self, job: Job, detokenizer: Any) -> None:  # noqa: ANN401  mlx-lm's
        self.job, self.ended, self.n_tokens = job, False, 0
        self._detokenizer = detokenizer
        # Text that is held back because a stop word may have begun in it.
        self._held = ""

    def add(self, generated: Any) -> Piece:  # noqa: ANN401  mlx-lm's
        """The piece that a generated token adds."""
        self.n_tokens += 1
        reason = generated.finish_reason
        if reason != "stop":
            self._detokenizer.add_token(generated.token)
        if reason is not None:
            self._detokenizer.finalize()
        text = self._held + self._detokenizer.last_segment
        found = [text.index(word) for word in self.job.stop_words if word in text]
        if found:
            reason, text = "stop", text[: min(found)]
        self.ended = reason is not None
        held = 0 if self.ended else _partial_stop(text, self.job.stop_words)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        logprob = float(generated.logprobs[generated.token].item())
        return Piece(text, generated.token, logprob, reason)


def _partial_stop(text: str, words: Sequence[str]) -> int:
    """Number of characters at the end of `text` that may begin one of the words."""
    longest = min(len(text), max(map(len, words), default=1) - 1)
    starts = (n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in words))
    return next(starts, 0)


class Scheduler:
    """Runs jobs of all tasks in one batch, on a thread of its own."""

    def __init__(
        self, model: MixedModel, router: Router | None, metrics: Metrics, batch: int, queue: int
    ) -> None:
        """Start the thread.

        Args:
            model: the pack on its base; used by the thread alone from now on.
            router: for jobs without a task.
            metrics: counts what happens.
            batch: most jobs that run at a time.
            queue: most jobs that wait.
        """
        self._model, self._router, self._metrics = model, router, metrics
        self._batch, self._max_open = batch, batch + queue
        self._inbox: Queue[Job] = Queue()
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

    def submit(self, job: Job) -> None:
        """Queue a job; `job.emit` gets its answer.

        Raises:
            RequestError: (503) the queue is full, or the server stops.
        """
        with self._changed:
            if not self.accepts:
                raise RequestError(503, "the server stops")
            if self._open >= self._max_open:
                raise RequestError(
                    503, f"{self._open} requests run or wait already; try again later"
                )
            self._open += 1
            self._inbox.put(job)
        self._metrics.open.set(self._open)

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
        running: dict[int, _RunningJob] = {}
        batch = self._new_batch()
        while not self._closing:
            try:
                self._admit_waiting(batch, running)
                if running:
                    self._step(batch, running)
            except Exception as error:  # no request may end the server
                _log.exception("a batch of %d requests failed", len(running))
                reason = f"generating failed ({type(error).__name__})"
                self._end_all(running, reason)
                # An exception while MLX traces a sampler leaves a placeholder as this thread's
                # random state; without a new seed everything sampled later would fail.
                mx.random.seed(time.time_ns())
                # Close before there is another: each restores the memory limit that Metal wires.
                batch.close()
                batch = self._new_batch()
        self._end_all(running, "the server stops")
        while not self._inbox.empty():
            self._end(self._inbox.get_nowait(), RuntimeError("the server stops"))
        del batch
        # A thread that used MLX destroys its streams before it ends, or the process may abort at
        # its exit.
        mx.clear_streams()

    def _new_batch(self) -> BatchGenerator:
        return BatchGenerator(
            self._model, completion_batch_size=self._batch,
            prefill_batch_size=min(8, self._batch), prefill_step_size=_PREFILL_TOKENS,
            stream=mx.default_stream(current_device()),
        )  # fmt: skip

    def _admit_waiting(self, batch: BatchGenerator, running: dict[int, _RunningJob]) -> None:
        """Put all waiting jobs into the batch; wait for one if none runs."""
        try:
            job = self._inbox.get(timeout=None if running else _POLL_SECONDS, block=not running)
            while True:
                self._admit(batch, running, job)
                job = self._inbox.get_nowait()
        except Empty:
            pass

    def _admit(self, batch: BatchGenerator, running: dict[int, _RunningJob], job: Job) -> None:
        if job.cancelled:
            self._end(job)
            return
        try:
            if job.routing_prompt:
                assert self._router is not None
                state = self._router.states(self._model.base.model, [job.routing_prompt])[0]
                (found,), match = self._router.matches(state), self._router.best(state)
                job.route = {"nearest": found.task, "similarity": round(found.similarity, 4),
                             "threshold": round(self._router.threshold, 4)}  # fmt: skip
                job.task = None if match is None else match.task
                job.prompt = job.prompts[job.task]
            (uid,) = batch.insert(
                [list(job.prompt)], max_tokens=[job.max_tokens],
                caches=[self._model.cache(job.task)], samplers=[job.sampler],
                logits_processors=[list(job.processors)], stop_sequences=[job.stop_sequences],
            )  # fmt: skip
        except Exception:  # no request may end the others
            _log.exception("a request could not be started")
            self._end(job, RuntimeError("the request could not be started"))
            return
        self._metrics.count_start(job.task, len(job.prompt))
        running[uid] = _RunningJob(job, self._model.base.tokenizer.detokenizer)
        job.emit(STARTED)

    def _step(self, batch: BatchGenerator, running: dict[int, _RunningJob]) -> None:
        """Generate a token for every row, or a piece of the prompts; drop jobs that ended."""
        prompts, tokens = batch.next()
        for prompt in prompts:
            running[prompt.uid].job.emit(prompt.progress)
        for token in tokens:
            one = running[token.uid]
            if not one.n_tokens:
                self._metrics.first_token.observe(time.perf_counter() - one.job.submitted)
            one.job.emit(one.add(token))
            self._metrics.answer_tokens.inc()
        over = [uid for uid, one in running.items() if one.ended or one.job.cancelled]
        batch.remove(over)
        for uid in over:
            self._end(running.pop(uid).job)

    def _end_all(self, running: dict[int, _RunningJob], reason: str) -> None:
        for one in running.values():
            self._end(one.job, RuntimeError(reason))
        running.clear()

    def _end(self, job: Job, error: Exception | None = None) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify_all()
        self._metrics.open.set(self._open)
        job.emit(error)
