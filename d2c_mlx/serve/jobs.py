"""A request on its way through the scheduler: its limits, and its tokens as text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.generate import StopSequences

from d2c_mlx.serve.adapters import Entry
from d2c_mlx.serve.prefixes import Beginning
from d2c_mlx.serve.requests import RequestError
from d2c_mlx.serve.router import Router

__all__ = ["STARTED", "Job", "Limits", "Piece", "RunningJob", "fit_answer"]

# The event that says that a job is in the batch, and its task chosen.
STARTED = "started"
# Tokens of an answer to a request that names no number.
_DEFAULT_TOKENS = 512


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
        spare: connections beside those whose requests run or wait.
        prefix_nbytes: bytes of keys and values of beginnings that prompts share; 0 keeps none.
    """

    batch: int = 16
    queue: int = 64
    body_nbytes: int = 1_000_000
    max_tokens: int = 2048
    seconds: float = 30.0
    drain_seconds: float = 10.0
    spare: int = 64
    prefix_nbytes: int = 500_000_000


def fit_answer(limits: Limits, context: int | None, n_prompt: int, asked: int | None) -> int:
    """Most tokens of the answer to a prompt.

    Args:
        limits: see `Limits`.
        context: most tokens of prompt and answer together; None if the model does not say.
        n_prompt: tokens of the prompt.
        asked: what the request asks for; None is a default, shortened to what there is room for.

    Raises:
        RequestError: (400) more than the limit, or than the context has room for.
    """
    most = limits.max_tokens
    max_tokens = min(_DEFAULT_TOKENS, most) if asked is None else asked
    if max_tokens > most:
        raise RequestError(400, f"max_tokens: found {max_tokens}, this server gives {most} at"
                           " most", "max_tokens")  # fmt: skip
    if context and asked is None:
        max_tokens = max(1, min(max_tokens, context - n_prompt))
    if not n_prompt or (context and n_prompt + max_tokens > context):
        raise RequestError(
            400,
            f"the prompt has {n_prompt} tokens; with max_tokens {max_tokens} the model's"
            f" context of {context} is too short",
        )
    return max_tokens


@dataclass(frozen=True)
class Piece:
    """What one generated token adds to an answer.

    Attributes:
        text: that is certain now; "" while a stop word may have begun.
        token: its id.
        logprob: its log-probability in nats.
        top: ids and log-probabilities of the likeliest tokens, as many as were asked for, or fewer
            where a grammar allows no more.
        finish_reason: "stop" or "length" with the last one.
    """

    text: str
    token: int
    logprob: float
    top: Sequence[tuple[int, float]]
    finish_reason: str | None


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


class RunningJob:
    """A job in the batch, with its tokens as text.

    It looks for stop words in the text: mlx-lm's generator finds one only if its tokens are those
    of the word alone.
    """

    def __init__(
        self, job: Job, entry: Entry | None, begun: Beginning, detokenizer: Any  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Begin; `entry` is the job's adapter, None for the base model, `begun` its beginning."""
        self.job, self.entry, self.begun, self.n_tokens = job, entry, begun, 0
        self.finish_reason: str | None = None
        self._ticked = job.submitted
        self._detokenizer = detokenizer
        # Text that is held back because a stop word may have begun in it.
        self._held = ""

    def tick(self) -> tuple[float, bool]:
        """Seconds since the token before, or since the job was made, and whether none was."""
        before, self._ticked = self._ticked, time.perf_counter()
        return self._ticked - before, not self.n_tokens

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
        self.finish_reason = reason
        held = 0 if reason else _partial_stop(text, self.job.stop_words)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        logprob = float(generated.logprobs[generated.token].item())
        return Piece(text, generated.token, logprob, self._top(generated.logprobs), reason)

    def _top(self, logprobs: mx.array) -> list[tuple[int, float]]:
        n = self.job.n_top
        if n < 1:
            return []
        likely = mx.argpartition(-logprobs, kth=n - 1)[:n]
        numbers: Any = likely.tolist(), logprobs[likely].tolist()
        # A token that a grammar forbids has -inf, and JSON has no such number.
        allowed = (one for one in zip(*numbers) if one[1] > -math.inf)
        return sorted(allowed, key=lambda one: -one[1])


def _partial_stop(text: str, words: Sequence[str]) -> int:
    """Number of characters at the end of `text` that may begin one of the words."""
    longest = min(len(text), max(map(len, words), default=1) - 1)
    starts = (n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in words))
    return next(starts, 0)
