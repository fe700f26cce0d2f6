"""How the tokens of an answer are chosen: mlx-lm's samplers and logits processors, and grammars."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
    make_sampler,
)

from d2c_mlx.serve.requests import Request, RequestError

__all__ = ["Grammars", "processors_of", "sampler_of"]

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
        # As mlx-lm, for which 0 is all tokens.
        if 0 < request.top_p < 1:
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
