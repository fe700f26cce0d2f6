"""How a request's tokens are chosen: mlx-lm's samplers and logits processors for its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from d2c_mlx.serve.api import Request

__all__ = ["processors_of", "sampler_of"]

# Lower temperatures are greedy: a float16 logit divided by them would be infinite.
_LOWEST_TEMPERATURE = 0.01
Sampler = Callable[[mx.array], mx.array]


def sampler_of(request: Request, vocabulary: int, kept: tuple[int, ...]) -> Sampler | None:
    """The sampler of a request; None takes the most likely token.

    Args:
        request: checked.
        vocabulary: number of token ids that the model knows.
        kept: token ids that XTC sampling never leaves out.
    """
    if request.temperature < _LOWEST_TEMPERATURE:
        return None
    # mlx-lm's sampler wants a top_k below the vocabulary; more are all tokens, which is 0.
    top_k = request.top_k if request.top_k < vocabulary else 0
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


def processors_of(request: Request) -> list[Any]:
    """mlx-lm's logits processors for the penalties and biases of a request."""
    return make_logits_processors(
        request.logit_bias, request.repetition_penalty, request.repetition_context_size,
        request.presence_penalty, request.presence_context_size, request.frequency_penalty,
        request.frequency_context_size,
    )  # fmt: skip
