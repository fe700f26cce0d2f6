"""How the tokens of an answer are chosen: mlx-lm's samplers and logits processors, and grammars."""

from __future__ import annotations

import asyncio
import random
import secrets
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from d2c_mlx.serve.requests import Request, RequestError, field_error

__all__ = ["Grammars", "processors_of", "sampler_of"]

Sampler = Callable[[mx.array], mx.array]
# One sampler for all requests with the same options: their rows are sampled at once.
_shared_sampler = lru_cache(maxsize=64)(make_sampler)
# Lower temperatures are greedy: a float16 logit divided by them would be infinite.
_LOWEST_TEMPERATURE = 0.01
# Between the values of a schema there is one space or none: models that are lost would go on with
# white space for ever.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Bytes of a schema; seconds of a processor and bytes in which a child compiles it, and of the stack
# on which that recurses: less than the server's threads have. Beyond them the child is ended, or
# ends itself: a chain of 3,000 references is a segmentation fault, and every pattern of a string
# doubles time and memory.
_MAX_BYTES, _SECONDS, _MEMORY, _STACK = 64_000, 3, 2 << 30, 1 << 20
_CHILD = f"""
import resource, sys, threading
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, {_MEMORY}))
from llguidance import LLMatcher, LLTokenizer
def compile(schema):
    try:
        grammar = LLMatcher.grammar_from_json_schema(schema)
        problem = LLMatcher.validate_grammar(grammar, LLTokenizer("byte"))
    except ValueError as error:
        problem = str(error)
    sys.stdout.write(problem)
threading.stack_size({_STACK})
thread = threading.Thread(target=compile, args=(sys.stdin.read(),))
thread.start()
thread.join()
"""


def sampler_of(request: Request, vocabulary: int) -> Sampler | None:
    """The sampler of a request, of a model that knows so many tokens; None is greedy."""
    if request.temperature < _LOWEST_TEMPERATURE:
        return None
    # mlx-lm's sampler wants a top_k below the vocabulary; more are all tokens, which is 0.
    top_k = request.top_k if request.top_k < vocabulary else 0
    if request.seed is None:
        return _shared_sampler(request.temperature, request.top_p, request.min_p, top_k=top_k)
    draws = random.Random(request.seed)
    sampler = make_sampler(request.temperature, request.top_p, request.min_p, top_k=top_k)

    def sample(logprobs: mx.array) -> mx.array:
        mx.random.seed(draws.getrandbits(64))
        token = sampler(logprobs)
        # Requests without a seed share the thread's numbers, which nobody may know.
        mx.random.seed(secrets.randbits(64))
        return token

    return sample


def processors_of(request: Request, vocabulary: int) -> list[Any]:
    """mlx-lm's logits processors for penalties and biases.

    Raises:
        RequestError: (400) a bias of a token that the model does not know.
    """
    bias = {int(token): value for token, value in request.logit_bias.items()}
    if bias and max(bias) >= vocabulary:
        raise field_error("logit_bias", max(bias), f"token ids below {vocabulary}")
    return make_logits_processors(
        bias,
        # 1 changes nothing, and 0 makes none.
        request.repetition_penalty if request.repetition_penalty != 1 else 0,
        request.repetition_context_size,
        request.presence_penalty,
        request.presence_context_size,
        request.frequency_penalty,
        request.frequency_context_size,
    )


class Grammars:
    """Logits processors that keep answers to JSON schemas, by llguidance."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:  # noqa: ANN401  mlx-lm's
        """For a tokenizer; the first schema prepares it, which takes about a second."""
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._checked: set[int] = set()

    @cached_property
    def _tokens(self) -> LLTokenizer:
        text = self._tokenizer.backend_tokenizer.to_str()
        return LLTokenizer(text, self._vocabulary, list(self._tokenizer.eos_token_ids))

    async def check(self, schema: str) -> None:
        """Compile a schema in a child process first, which ends when this task is cancelled.

        Raises:
            RequestError: (400) it is no schema, or too large, or takes too long.
        """
        if hash(schema) in self._checked:
            return
        if len(schema) > _MAX_BYTES:
            raise _refusal(f"it has {len(schema)} bytes, at most {_MAX_BYTES} are read")
        pipes: Any = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.DEVNULL,
        }
        command = sys.executable, "-I", "-c", _CHILD
        child = await asyncio.create_subprocess_exec(*command, **pipes)
        try:
            output, _ = await asyncio.wait_for(child.communicate(schema.encode()), 5 * _SECONDS)
        except asyncio.TimeoutError:
            output = b""
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode:
            bounds = f"{_SECONDS} s, {_MEMORY >> 30} GB or too deep a stack"
            raise _refusal(f"to compile it takes more than {bounds}")
        if output:
            raise _refusal(output.decode(errors="replace"))
        self._checked.add(hash(schema))

    def processor(self, schema: str) -> Callable[[mx.array, mx.array], mx.array]:
        """A processor for one answer, of a schema that was checked.

        Raises:
            RequestError: (400) the tokenizer has no tokens for it.
        """
        ends = list(self._tokenizer.eos_token_ids)
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_COMPACT)
        matcher, begun = LLMatcher(self._tokens, grammar, log_level=0), list[bool]()
        if matcher.is_error():
            raise _refusal(matcher.get_error())

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            if begun:
                matcher.consume_token(int(np.array(tokens[-1])))
            begun.append(True)
            allowed = np.zeros(logits.shape[-1], bool)
            if matcher.is_error():
                # It ends here, and the others of its batch go on.
                allowed[ends] = True
            else:
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                bits = np.unpackbits(bits, bitorder="little")[: len(allowed)]
                allowed[: len(bits)] = bits
            return mx.where(mx.array(allowed), logits, -mx.inf)

        return process


def _refusal(problem: str) -> RequestError:
    words = f"response_format: the schema is refused ({' '.join(problem.split())[:200]})"
    return RequestError(400, words, "response_format")
