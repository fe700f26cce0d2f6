"""A request on its way through the scheduler: how its tokens are chosen, and become text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.generate import StopSequences
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
    make_sampler,
)

from d2c_mlx.serve.adapters import Entry
from d2c_mlx.serve.api import Request, RequestError
from d2c_mlx.serve.prefixes import Beginning
from d2c_mlx.serve.router import Router

__all__ = [
    "STARTED",
    "Grammars",
    "Job",
    "Limits",
    "Piece",
    "RunningJob",
    "fit_answer",
    "processors_of",
    "sampler_of",
]

# The event that says that a job is in the batch, and its task chosen.
STARTED = "started"
# Tokens of an answer to a request that names no number.
_DEFAULT_TOKENS = 512
# Lower temperatures are greedy: a float16 logit divided by them would be infinite.
_LOWEST_TEMPERATURE = 0.01
# Between the values of a schema there is one space or none: models that are lost would go on with
# white space for ever.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
Sampler = Callable[[mx.array], mx.array]


def sampler_of(
    request: Request, vocabulary: int, kept: tuple[int, ...], choice: int = 0
) -> Sampler | None:
    """The sampler of a request; None takes the most likely token.

    Args:
        request: checked.
        vocabulary: number of token ids that the model knows.
        kept: token ids that XTC sampling never leaves out.
        choice: number of the answer, of those that the request asks for.
    """
    if request.temperature < _LOWEST_TEMPERATURE:
        return None
    # mlx-lm's sampler wants a top_k below the vocabulary; more are all tokens, which is 0.
    top_k = request.top_k if request.top_k < vocabulary else 0
    if request.seed is not None:
        return _seeded(request, top_k, request.seed + choice)
    xtc = request.xtc_probability, request.xtc_threshold
    return _sampler(request.temperature, request.top_p, request.min_p, top_k, xtc, kept)


# Rows that share one sampler are sampled at once.
@lru_cache(maxsize=64)
def _sampler(
    temperature: float, top_p: float, min_p: float, top_k: int, xtc: tuple[float, float],
    kept: tuple[int, ...],
) -> Sampler:  # fmt: skip
    return make_sampler(
        temperature, top_p, min_p, top_k=top_k, xtc_probability=xtc[0], xtc_threshold=xtc[1],
        xtc_special_tokens=list(kept),
    )  # fmt: skip


def _seeded(request: Request, top_k: int, seed: int) -> Sampler:
    """As mlx-lm's sampler, with random numbers of its own instead of those of the thread."""
    keys: list[mx.array] = []

    def sample(logprobs: mx.array) -> mx.array:
        # An array belongs to the thread that makes it, so the first key is made here.
        key, now = mx.random.split(keys.pop() if keys else mx.random.key(seed % 2**64))
        keys.append(key)
        if request.top_p < 1:
            logprobs = apply_top_p(logprobs, request.top_p)
        if request.min_p:
            logprobs = apply_min_p(logprobs, request.min_p)
        if top_k:
            logprobs = apply_top_k(logprobs, top_k)
        return mx.random.categorical(logprobs * (1 / request.temperature), key=now)

    return sample


def processors_of(request: Request) -> list[Any]:
    """mlx-lm's logits processors for the penalties and biases of a request."""
    return make_logits_processors(
        request.logit_bias, request.repetition_penalty, request.repetition_context_size,
        request.presence_penalty, request.presence_context_size, request.frequency_penalty,
        request.frequency_context_size,
    )  # fmt: skip


class Grammars:
    """Logits processors that keep answers to JSON schemas, by llguidance."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:  # noqa: ANN401  mlx-lm's
        """Prepare a tokenizer, which takes about a second."""
        self._tokens = LLTokenizer(
            tokenizer.backend_tokenizer.to_str(), vocabulary, list(tokenizer.eos_token_ids)
        )
        self._ends = list(tokenizer.eos_token_ids)

    def processor(self, schema: str) -> Callable[[mx.array, mx.array], mx.array]:
        """A processor for one answer; raises RequestError (400) for what is no schema."""
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)
            problem = LLMatcher.validate_grammar(grammar, self._tokens)
        except ValueError as error:
            problem = str(error)
        if problem:
            words = f"response_format: the schema is refused ({' '.join(problem.split())[:200]})"
            raise RequestError(400, words, "response_format")
        matcher, begun = LLMatcher(self._tokens, grammar, log_level=0), list[bool]()

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            if begun:
                matcher.consume_token(int(np.array(tokens[-1])))
            begun.append(True)
            allowed = np.zeros(logits.shape[-1], bool)
            if matcher.is_error():
                # It ends here, and the others of its batch go on.
                allowed[self._ends] = True
            else:
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                bits = np.unpackbits(bits, bitorder="little")[: len(allowed)]
                allowed[: len(bits)] = bits
            return mx.where(mx.array(allowed), logits, -mx.inf)

        return process


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
        top: ids and log-probabilities of the likeliest tokens, as many as were asked for.
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
        return sorted(zip(*numbers), key=lambda one: -one[1])


def _partial_stop(text: str, words: Sequence[str]) -> int:
    """Number of characters at the end of `text` that may begin one of the words."""
    longest = min(len(text), max(map(len, words), default=1) - 1)
    starts = (n for n in range(longest, 0, -1) if any(w.startswith(text[-n:]) for w in words))
    return next(starts, 0)
