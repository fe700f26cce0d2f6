"""Faster kernels for MLX's CPU backend, and how much of a graph it is given at a time.

MLX 0.32 on x86 takes about 9 ns for one exp, but 3 for tanh and for power (measured:
benchmarks/notes/2026-11-26-engine-savings.md). SwiGLU, attention and the sum over the vocabulary
are mostly exponentials. Written with the fast ones they are the same functions, and closer to a
float64 reference than mlx-lm's own.
"""

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations
from mlx_lm.models.base import scaled_dot_product_attention

_thread = threading.local()


@contextmanager
def eager_evaluation() -> Iterator[None]:
    """Make `eval_if_eager` evaluate inside the block, in this thread.

    For threads that evaluate side by side on a CPU. MLX lets about a hundred operations wait, over
    all streams: a thread that has queued a whole forward pass keeps the others from queueing
    anything while their cores are idle. So each queues about half a transformer block at a time.
    """
    _thread.eager = True
    try:
        yield
    finally:
        _thread.eager = False


def eval_if_eager(*arrays: mx.array) -> None:
    """Evaluate these arrays now if this thread is inside `eager_evaluation`; else do nothing."""
    if getattr(_thread, "eager", False):
        mx.eval(arrays)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """`silu(gate) * x`, all of one shape, computed with `sigmoid(2h) = (1 + tanh(h)) / 2`."""
    eval_if_eager(gate, x)
    half = 0.5 * gate
    return (half + half * mx.tanh(half)) * x


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: object,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`, the softmax in base 2 and normalised last.

    Args:
        queries: `(rows, heads, width, dim)`.
        keys: `(rows, kv_heads, span, dim)`; heads is a multiple of kv_heads.
        values: `(rows, kv_heads, span, value_dim)`.
        cache: mlx-lm's; a quantized one takes mlx-lm's own path, and so do sinks.
        scale: factor on the scores before the softmax.
        mask: "causal" (the last query sees all keys), boolean, additive, or None.
        sinks: see mlx-lm.

    Returns:
        `(rows, heads, width, value_dim)`.
    """
    if sinks is not None or hasattr(cache, "bits"):
        return scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    rows, heads, width, _ = queries.shape
    kv_heads, span = keys.shape[1:3]
    # Query heads that share keys lie one after the other, as longer sequences.
    grouped = (queries * (scale * math.log2(math.e))).reshape(
        rows, kv_heads, heads // kv_heads * width, -1
    )
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(rows, heads, width, span)
    if isinstance(mask, str):
        mask = mx.arange(span) <= mx.arange(span - width, span)[:, None]
    if mask is not None:
        seen = mask.dtype == mx.bool_
        scores = scores + (mx.where(mask, 0.0, -mx.inf) if seen else mask * math.log2(math.e))
    powers = mx.power(2.0, scores - scores.max(axis=-1, keepdims=True))
    mixed = powers.reshape(*grouped.shape[:3], span) @ values
    return mixed.reshape(rows, heads, width, -1) / powers.sum(axis=-1, keepdims=True)


_REPLACED = {
    "swiglu": (activations.swiglu, swiglu),
    "scaled_dot_product_attention": (scaled_dot_product_attention, attention),
}


def use_fast_exponentials(model: nn.Module, fast: bool) -> None:
    """Switch a model's architecture to `swiglu` and `attention` of this file, or back to mlx-lm's.

    mlx-lm's files import the functions by name, so a name is replaced where it is looked up: for
    every model of that architecture in this process.

    Args:
        model: an mlx-lm model.
        fast: True for this file's functions, False for mlx-lm's.
    """
    architecture = sys.modules[type(model).__module__]
    for name, functions in _REPLACED.items():
        if getattr(architecture, name, None) in functions:
            setattr(architecture, name, functions[fast])


def target_scores(logits: mx.array, targets: mx.array, fast: bool) -> tuple[mx.array, mx.array]:
    """Logsumexp over the vocabulary and the target's logit; their difference is the NLL.

    The sum is in two steps of about sqrt(vocabulary) terms each. MLX's CPU kernel adds all terms
    one after the other in float32 and loses the small ones: a vocabulary of 49,152 came out up to
    2e-4 nats too low.

    Args:
        logits: `(n, vocabulary)`, of any dtype.
        targets: `(n,)` token ids.
        fast: use `power` for the exponentials, which is faster on a CPU.

    Returns:
        Both `(n,)`, in float32.
    """
    logits = logits.astype(mx.float32)
    gold = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    n, width = logits.shape[0], 256
    if logits.shape[1] % width:
        pad = [(0, 0), (0, -logits.shape[1] % width)]
        logits = mx.pad(logits, pad, constant_values=-mx.inf)
    blocks = logits.reshape(n, -1, width)
    if not fast:
        return mx.logsumexp(mx.logsumexp(blocks, axis=-1), axis=-1), gold
    top = blocks.max(axis=(1, 2))
    powers = mx.power(2.0, (blocks - top[:, None, None]) * math.log2(math.e))
    return top + mx.log(powers.sum(axis=-1).sum(axis=-1)), gold
