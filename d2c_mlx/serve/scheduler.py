"""The thread that generates: requests come in at any time, one batch runs, tokens go out.

mlx-lm's `BatchGenerator` does the batching; here are the requests around it: routing those without
a task, a limit to how many wait, and clients that leave.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.server import Response

from d2c_mlx.serve.metrics import Meters
from d2c_mlx.serve.mixed_batch import MixedModel
from d2c_mlx.serve.requests import Refusal
from d2c_mlx.serve.router import Router

__all__ = ["TEXT", "Scheduler", "Turn"]

_log = logging.getLogger(__name__)
# Seconds between two looks at whether a client is still there, and at an empty queue.
_LOOK = 0.2
# Prompt tokens of a row between two steps of the others.
_PREFILL = 512
# In place of a token where a response has text alone.
TEXT = -1


@dataclass(eq=False)
class Turn:
    """One request on its way.

    Attributes:
        prompt: token ids.
        task: of the pack; None is the base model.
        route: token ids of the prompt by which the task is chosen; None: it is given.
        max_tokens: of the answer.
        sampler: of mlx-lm; None takes the most likely token.
        processors: mlx-lm's logits processors.
        stops: tokens that end an answer.
        stop_words: text that ends it, and is not part of it.
        n_tokens: of the answer so far.
        untold: tokens and their log-probabilities that the client was not told yet.
        gone: set it when nobody waits any more.
    """

    prompt: list[int]
    task: str | None
    route: list[int] | None
    max_tokens: int
    sampler: Callable[[mx.array], mx.array] | None
    processors: list[Any]
    stops: StopSequences
    stop_words: Sequence[str] = ()
    n_tokens: int = 0
    untold: list[tuple[int, float]] = field(default_factory=list)
    gone: bool = False
    asked: float = field(default_factory=time.perf_counter)
    events: Queue[Any] = field(default_factory=Queue)

    def wait_for_task(self, check: Callable[[], None]) -> None:
        """Wait until the router has chosen; see `responses`."""
        self._next(check)

    def responses(
        self, check: Callable[[], None], progress: Callable[[int, int], None]
    ) -> Iterator[Response]:
        """Yield what is generated, a token each, and text alone with the token `TEXT`.

        Args:
            check: is called now and then; what it raises ends the waiting.
            progress: is told how many tokens of the prompt are done, of how many.

        Raises:
            RuntimeError: generating failed.
        """
        looked = time.perf_counter()
        while (event := self._next(check)) is not None:
            if time.perf_counter() - looked > _LOOK:
                check()
                looked = time.perf_counter()
            if isinstance(event, tuple):
                progress(*event)
            else:
                if event.token != TEXT:
                    self.untold.append((event.token, event.logprob))
                yield event

    def _next(self, check: Callable[[], None]) -> Any:  # noqa: ANN401  see `responses`
        while True:
            try:
                event = self.events.get(timeout=_LOOK)
            except Empty:
                check()
                continue
            if isinstance(event, Exception):
                raise event
            return event


class _Answer:
    """A turn that runs, its tokens as text.

    mlx-lm's handler leaves out text that comes with the reason "stop" or was held back until then,
    and its generator finds a stop word only where its tokens are those of the word alone.
    """

    def __init__(self, turn: Turn, detokenizer: Any) -> None:  # noqa: ANN401  mlx-lm's
        self.turn, self.ended = turn, False
        self._text = detokenizer
        # What a stop word may have begun with.
        self._held = ""

    def add(self, one: Any) -> Iterator[Response]:  # noqa: ANN401  mlx-lm's
        """Yield what to tell the client about a token."""
        self.turn.n_tokens += 1
        reason = one.finish_reason
        if reason != "stop":
            self._text.add_token(one.token)
        if reason is not None:
            self._text.finalize()
        text = self._held + self._text.last_segment
        found = [text.index(word) for word in self.turn.stop_words if word in text]
        if found:
            reason, text = "stop", text[: min(found)]
        self.ended = reason is not None
        held = 0 if self.ended else _begun(text, self.turn.stop_words)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        logprob = float(one.logprobs[one.token].item())
        if reason == "stop":
            # With that reason mlx-lm's handler would leave this text out, and what it has held back
            # because a control marker may begin so; with "length" it gives out both.
            yield Response(text, TEXT, 0.0, "length", ())
            text = ""
        yield Response(text, one.token, logprob, reason, ())


def _begun(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the words."""
    longest = min(len(text), max(map(len, words), default=1) - 1)
    starts = (n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in words))
    return next(starts, 0)


class Scheduler:
    """Runs turns of all tasks in one batch, on a thread of its own."""

    def __init__(
        self, model: MixedModel, router: Router | None, meters: Meters, batch: int, queue: int
    ) -> None:
        """Start the thread.

        Args:
            model: the pack on its base; used by the thread alone from now on.
            router: for turns without a task.
            meters: what happens is counted there.
            batch: most turns that run at a time.
            queue: most that wait for it.
        """
        self._model, self._router, self._meters = model, router, meters
        self._batch, self._most = batch, batch + queue
        self._inbox: Queue[Turn] = Queue()
        self._open, self._lock = 0, Lock()
        self._closing = False
        self._thread = Thread(target=self._run, name="d2c-mlx-scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes turns."""
        return self._thread.is_alive() and not self._closing

    def submit(self, turn: Turn) -> None:
        """Put a turn in the queue; Refusal (503) if that is full."""
        with self._lock:
            if self._open >= self._most or not self.alive:
                raise Refusal(503, f"{self._open} requests run or wait already; try again later")
            self._open += 1
        self._meters.open.set(self._open)
        self._inbox.put(turn)

    def close(self) -> None:
        """Stop; turns that run end with an error."""
        self._closing = True
        self._thread.join()

    def _run(self) -> None:
        turns: dict[int, _Answer] = {}
        batch = self._new_batch()
        while not self._closing:
            try:
                self._take(batch, turns)
                if turns:
                    self._step(batch, turns)
            except Exception as error:  # no request may end the server
                _log.exception("a batch of %d requests failed", len(turns))
                for one in turns.values():
                    self._end(one.turn, RuntimeError(f"generating failed ({type(error).__name__})"))
                turns.clear()
                # What fails while MLX traces a sampler leaves a placeholder as this thread's random
                # state, which fails everything that is sampled later.
                mx.random.seed(time.time_ns())
                # Before there is another: each sets back what memory Metal wires.
                batch.close()
                batch = self._new_batch()
        for one in turns.values():
            self._end(one.turn, RuntimeError("the server stops"))
        del batch
        # As MLX asks of every thread: see `schedule._Own`.
        mx.clear_streams()

    def _new_batch(self) -> BatchGenerator:
        return BatchGenerator(
            self._model, completion_batch_size=self._batch,
            prefill_batch_size=min(8, self._batch), prefill_step_size=_PREFILL,
            stream=mx.default_stream(mx.default_device()),
        )  # fmt: skip

    def _take(self, batch: BatchGenerator, turns: dict[int, _Answer]) -> None:
        """Insert all turns that wait; wait for one if none runs."""
        try:
            turn = self._inbox.get(timeout=None if turns else _LOOK, block=not turns)
            while True:
                self._insert(batch, turns, turn)
                turn = self._inbox.get_nowait()
        except Empty:
            pass

    def _insert(self, batch: BatchGenerator, turns: dict[int, _Answer], turn: Turn) -> None:
        if turn.gone:
            self._end(turn)
            return
        try:
            if turn.route:
                assert self._router is not None
                match = self._router.route(self._model.base.model, turn.route)
                turn.task = None if match is None else match.task
                turn.events.put("routed")
            (uid,) = batch.insert(
                [list(turn.prompt)], max_tokens=[turn.max_tokens],
                caches=[self._model.cache(turn.task)], samplers=[turn.sampler],
                logits_processors=[turn.processors], stop_sequences=[turn.stops],
            )  # fmt: skip
        except Exception:  # nor the others
            _log.exception("a request could not be started")
            self._end(turn, RuntimeError("the request could not be started"))
            return
        self._meters.started(turn.task, len(turn.prompt))
        turns[uid] = _Answer(turn, self._model.base.tokenizer.detokenizer)

    def _step(self, batch: BatchGenerator, turns: dict[int, _Answer]) -> None:
        prompts, tokens = batch.next()
        for one in prompts:
            turns[one.uid].turn.events.put(one.progress)
        for one in tokens:
            answer = turns[one.uid]
            if not answer.turn.n_tokens:
                waited = time.perf_counter() - answer.turn.asked
                self._meters.first_token.observe(waited)
            for response in answer.add(one):
                answer.turn.events.put(response)
            self._meters.answer_tokens.inc()
        over = [uid for uid, one in turns.items() if one.ended or one.turn.gone]
        batch.remove(over)
        for uid in over:
            self._end(turns.pop(uid).turn)

    def _end(self, turn: Turn, error: Exception | None = None) -> None:
        with self._lock:
            self._open -= 1
        self._meters.open.set(self._open)
        turn.events.put(error)
