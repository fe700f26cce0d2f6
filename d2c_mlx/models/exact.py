"""Which parts of a base model run alone exactly: tried on the model itself.

mlx-lm's architectures differ (logit caps, sliding windows, embedding scales), so nothing is
assumed: a part is used only after it gave the whole model's own output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from d2c_mlx.models.forward import body_blocks, body_prefix, find_body, text_part
from d2c_mlx.utils.errors import ModelError

__all__ = ["blocks_are_exact", "find_head", "prefix_is_exact", "split_is_exact"]

_TEST_TOKENS = list(range(1, 13))
_TEST_WINDOW = 4
# Errors of an architecture that cannot be run in parts.
_ERRORS = (AttributeError, IndexError, TypeError, ValueError, ModelError)


def find_head(model: nn.Module) -> Callable[[mx.array], mx.array] | None:
    """The head as a function of hidden states, if it gives the model's own logits here.

    None where an architecture scales or caps its logits; then use `full_logits`.
    """
    x = mx.array([_TEST_TOKENS])
    try:
        inner = find_body(model)
        head = getattr(text_part(model), "lm_head", None)
        if head is None:
            head = inner.embed_tokens.as_linear
        return head if _close(head(inner(x, cache=None)), model(x)) else None
    except _ERRORS:
        return None


def prefix_is_exact(model: nn.Module) -> bool:
    """True if running a prefix once, and then two rows after it, gives the output of whole rows."""
    if not all(type(one) in (KVCache, RotatingKVCache) for one in make_prompt_cache(model)):
        return False
    x = mx.array([_TEST_TOKENS, _TEST_TOKENS[::-1]])
    x[1, :5] = x[0, :5]

    def same(body: nn.Module) -> bool:
        _, states = body_prefix(body, x[:1, :5])
        return _close(body_blocks(body, x[:, 5:], states), body(x, cache=None)[:, 5:])

    return _proven(model, same)


def split_is_exact(model: nn.Module, first: int) -> bool:
    """True if running the blocks below block `first`, and then the rest, gives the same output."""
    x = mx.array([_TEST_TOKENS])

    def same(body: nn.Module) -> bool:
        lower, below = body_prefix(body, x[:, :5], 0, first)
        _, above = body_prefix(body, lower, first)
        rest = body_blocks(body, x[:, 5:], below, 0, first)
        return _close(body_blocks(body, rest, above, first), body(x, cache=None)[:, 5:])

    return _proven(model, same)


def blocks_are_exact(model: nn.Module) -> bool:
    """True if running the blocks one at a time gives the same output as all at once."""
    x = mx.array([_TEST_TOKENS])

    def same(body: nn.Module) -> bool:
        hidden = x
        for block in range(len(body.layers)):
            hidden = body_blocks(body, hidden, first=block, stop=block + 1)
        return _close(hidden, body(x, cache=None))

    return _proven(model, same)


def _proven(model: nn.Module, same: Callable[[nn.Module], bool]) -> bool:
    """True if the body passes a test, also with a sliding window that the test's rows fill."""
    try:
        body = find_body(model)
        caches = list(_flat(make_prompt_cache(model)))
        if any(isinstance(one, ChunkedKVCache) for one in caches) or not same(body):
            return False
        windows = {one.max_size for one in caches if isinstance(one, RotatingKVCache)}
        if not windows:
            return True
        narrow, x = copy.copy(body), mx.array([_TEST_TOKENS])
        for name in [k for k, v in vars(body).items() if isinstance(v, int) and v in windows]:
            setattr(narrow, name, _TEST_WINDOW)
        # A window that is kept elsewhere stays as it was, and nothing would be tested.
        return not _close(narrow(x, cache=None), body(x, cache=None)) and same(narrow)
    except _ERRORS:
        return False


def _flat(caches: Sequence[Any]) -> Iterator[Any]:
    for one in caches:
        yield from _flat(one.caches) if isinstance(one, CacheList) else (one,)


def _close(x: mx.array, y: mx.array) -> bool:
    # A real difference (a cap, a scale, a wrong mask) is far above rounding.
    tolerance = 1e-3 if x.dtype == y.dtype == mx.float32 else 2e-2
    x, y = x.astype(mx.float32), y.astype(mx.float32)
    return bool((mx.abs(x - y).max() <= tolerance * mx.maximum(mx.abs(y).max(), 1.0)).item())
