"""Running parts of a base model: blocks, a shared prefix, the head; and whether that is exact.

A part is the whole body, whose other blocks are passed over, so that every block stays at its place
and keeps its kind of mask. mlx-lm's architectures differ (logit caps, sliding windows, embedding
scales), so nothing is assumed: a part is used only after it gave the whole model's own output.
"""

import copy
from collections.abc import Callable, Sequence
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

from d2c_mlx.models.kernels import eval_if_eager
from d2c_mlx.utils.errors import ModelError

KeysValues = tuple[mx.array, mx.array]
# Weights of a head that are cast to float32 at a time. MLX may still hold several casts.
_AT_ONCE = 1 << 24
# Names under which architectures keep the part below the head.
_BODIES = ("model", "backbone", "transformer")
_TEST_TOKENS = list(range(1, 13))
_TEST_WINDOW = 4
# Errors of an architecture that cannot be run in parts.
_ERRORS = (AttributeError, IndexError, TypeError, ValueError, ModelError)


class _Prefix:
    """A cache that puts the keys and values of a shared prefix before every row's own.

    Without a prefix it hands keys and values through. It remembers those that it was given.
    """

    def __init__(self, before: KeysValues | None = None) -> None:
        self._before, self.offset = before, before[0].shape[2] if before else 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        eval_if_eager(keys, values)
        self.states = keys, values
        if self._before is None:
            return self.states
        # Row i continues prefix i // n.
        n = keys.shape[0] // self._before[0].shape[0]
        before = (mx.repeat(x, n, axis=0) for x in self._before)
        whole = [mx.concatenate([x, y], axis=2) for x, y in zip(before, self.states)]
        return whole[0], whole[1]

    def make_mask(self, n: int, **kwargs: Any) -> Any:  # noqa: ANN401  as mlx-lm's own caches
        cache = KVCache()
        cache.offset = self.offset
        return cache.make_mask(n, **kwargs)


class _Passed:
    """A block that is not run: gives back what it gets, or `instead` of it."""

    def __init__(self, block: nn.Module, instead: mx.array | None = None) -> None:
        self.block, self.instead = block, instead
        self.seen: list[mx.array] = []

    def __call__(self, x: mx.array, *args: object, **kwargs: object) -> mx.array:
        self.seen.append(x)
        return x if self.instead is None else self.instead

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  as the block's own
        return getattr(self.block, name)


def run_blocks(
    model: nn.Module,
    x: mx.array,
    states: Sequence[KeysValues | _Prefix] | None = None,
    first: int = 0,
    stop: int | None = None,
    body: nn.Module | None = None,
) -> mx.array:
    """Hidden states after blocks `first` to `stop`, normed if these are the last ones.

    Args:
        model: an mlx-lm model.
        x: token ids `(rows, width)` if `first` is 0, else hidden states `(rows, width, hidden)`.
        states: keys and values of a shared prefix for every block from `first` on, or the caches
            that shall remember those of this pass.
        first: index of the first block to run.
        stop: index after the last one; None is all.
        body: None is that of `find_body`.

    Returns:
        `(rows, width, hidden)`.
    """
    cache: Any = None
    if states is not None:
        cache = [x if isinstance(x, _Prefix) else _Prefix(x) for x in states]
    body = body or find_body(model)
    blocks = body.layers
    stop = len(blocks) if stop is None else min(stop, len(blocks))
    if (first, stop) == (0, len(blocks)):
        return body(x, cache=cache)
    # A shallow copy has the same modules; the model itself stays whole for other threads.
    part = copy.copy(body)
    part.layers = layers = [
        block if first <= i < stop else _Passed(block, x if i == first - 1 else None)
        for i, block in enumerate(blocks)
    ]
    if cache is not None:
        # Masks are made from the cache of any block, also of one that is passed over.
        cache = [cache[0]] * first + cache + [cache[0]] * (len(blocks) - stop)
    y = part(x if first == 0 else mx.zeros(x.shape[:2], mx.int32), cache=cache)
    # Nothing evaluates what follows the last block.
    return y if stop == len(blocks) else layers[stop].seen[0]


def run_prefix(
    model: nn.Module,
    x: mx.array,
    first: int = 0,
    stop: int | None = None,
    body: nn.Module | None = None,
) -> tuple[mx.array, list[KeysValues]]:
    """Run blocks over a shared prefix, to pass its keys and values to `run_blocks`.

    Arguments are those of `run_blocks`, without `states`.

    Returns:
        The hidden states, `(rows, width, hidden)`, and keys and values of every block, each
        `(rows, heads, width, dim)`.
    """
    body = body or find_body(model)
    caches = [_Prefix() for _ in body.layers[first:stop]]
    hidden = run_blocks(model, x, caches, first, stop, body)
    return hidden, [cache.states for cache in caches]


def find_body(model: nn.Module) -> nn.Module:
    """The part of an mlx-lm model that runs the blocks and the last norm, without the head.

    Of a model that takes images too, that of its language model.

    Raises:
        ModelError: the architecture has no such part.
    """
    text = getattr(model, "language_model", model)
    for body in (getattr(text, name, None) for name in _BODIES):
        if hasattr(body, "layers"):
            return body
    raise ModelError(
        f"{type(model).__module__}: blocks of this architecture cannot be run apart from its head"
    )


def full_logits(
    model: nn.Module, x: mx.array, states: Sequence[KeysValues] | None = None
) -> mx.array:
    """Logits of the whole model, `(rows, width, vocabulary)`; arguments are those of `run_blocks`.

    For architectures without `find_head`; elsewhere the head is run at target positions only.
    """
    return model(x, cache=None if states is None else [*map(_Prefix, states)])


def head_in_float32(head: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """The head of `find_head`, computed in float32 from weights of any dtype.

    For differences of logits that are smaller than their rounding in 16 bits: between 16 and 32
    that is 1/8 in bfloat16. Weights that are quantized, or in float32, stay as they are.
    """
    # A tied head is a method of the embedding.
    module: Any = getattr(head, "__self__", head)
    weight, bias = module["weight"], module.get("bias")
    if "scales" in module:
        return lambda hidden: head(hidden.astype(mx.float32))
    if weight.dtype == mx.float32:
        return head
    n = max(1, _AT_ONCE // weight.shape[1])
    # A gradient casts again what it needs, and does not keep the whole head in float32.
    product = mx.checkpoint(lambda hidden, rows: hidden @ rows.astype(mx.float32).T)

    def head32(hidden: mx.array) -> mx.array:
        hidden = hidden.astype(mx.float32)
        parts: list[mx.array] = []
        for i in range(0, len(weight), n):
            parts.append(product(wait_for(hidden, parts[-1:]), weight[i : i + n]))
        logits = mx.concatenate(parts, axis=-1)
        return logits if bias is None else logits + bias

    return head32


def wait_for(x: mx.array, done: Sequence[mx.array]) -> mx.array:
    """`x`, evaluated only after `done` is, so that fewer arrays are in memory at once."""
    return mx.depends([x], list(done))[0] if done else x


def find_head(model: nn.Module) -> Callable[[mx.array], mx.array] | None:
    """The head as a function of hidden states, if it gives the model's own logits here.

    None where an architecture scales or caps its logits; then use `full_logits`.
    """
    x = mx.array([_TEST_TOKENS])
    try:
        inner = find_body(model)
        head = getattr(getattr(model, "language_model", model), "lm_head", None)
        if head is None:
            head = inner.embed_tokens.as_linear
        return head if _close(head(inner(x, cache=None)), model(x)) else None
    except _ERRORS:
        return None


def parts_are_exact(model: nn.Module, cuts: Sequence[int] = (), prefix: bool = True) -> bool:
    """True if running the model in parts gives the same output as running it as a whole.

    It must do so with a sliding window that the test's rows fill, too. Other parts begin with the
    blocks `cuts`. A `prefix` runs the tokens that rows share once, and the rest of two after them.
    """
    rows = mx.array([_TEST_TOKENS, _TEST_TOKENS[::-1]])
    rows[1, :5] = rows[0, :5]

    def same(body: nn.Module) -> bool:
        hidden, shared, states = rows[:, 5:] if prefix else rows, rows[:1, :5], None
        for first, stop in zip([0, *cuts], [*cuts, len(body.layers)]):
            if prefix:
                shared, states = run_prefix(model, shared, first, stop, body)
            hidden = run_blocks(model, hidden, states, first, stop, body)
        return _close(hidden, body(rows, cache=None)[:, -hidden.shape[1] :])

    try:
        body, caches = find_body(model), make_prompt_cache(model)
        if prefix and not all(type(cache) in (KVCache, RotatingKVCache) for cache in caches):
            return False
        while any(isinstance(cache, CacheList) for cache in caches):
            caches = [inner for cache in caches for inner in getattr(cache, "caches", [cache])]
        if any(isinstance(cache, ChunkedKVCache) for cache in caches) or not same(body):
            return False
        windows = {cache.max_size for cache in caches if isinstance(cache, RotatingKVCache)}
        if not windows:
            return True
        narrow = copy.copy(body)
        for name in [k for k, v in vars(body).items() if isinstance(v, int) and v in windows]:
            setattr(narrow, name, _TEST_WINDOW)
        # A window that is kept elsewhere stays as it was, and nothing would be tested.
        return not _close(narrow(rows, cache=None), body(rows, cache=None)) and same(narrow)
    except _ERRORS:
        return False


def _close(x: mx.array, y: mx.array) -> bool:
    # A real difference (a cap, a scale, a wrong mask) is far above rounding.
    tolerance = 1e-3 if x.dtype == y.dtype == mx.float32 else 2e-2
    x, y = x.astype(mx.float32), y.astype(mx.float32)
    return bool((mx.abs(x - y).max() <= tolerance * mx.maximum(mx.abs(y).max(), 1.0)).item())
