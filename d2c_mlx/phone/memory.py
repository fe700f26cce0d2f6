"""What a model takes in memory while it answers: measured, and by a model that is fitted to that.

    peak = weights + loaded adapters + KV cache + rest

Weights and adapters are counted. KV cache and rest, all that MLX holds besides, are straight lines
in the context, because prompts are read in parts. Two measured peaks give them, others check them.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.kernels import use_fast_exponentials
from d2c_mlx.models.model import Model
from d2c_mlx.models.stock import switch
from d2c_mlx.utils.device import current_device

# Tokens of a prompt that are read at once: mlx-swift-lm's default.
CHUNK = 512
# Bits of a KV cache: 16 is not quantized. And numbers that share a scale and an offset.
KV_BITS, _GROUP = (16, 8, 4), 64

Json = dict[str, Any]
# Bits of the KV cache -> slope and constant of KV cache and rest, in numbers and in bytes.
MemoryModel = Mapping[int, Mapping[str, Sequence[float]]]


def generate(
    model: nn.Module, prompt: Sequence[int], n: int, kv_bits: int = 16
) -> tuple[float, float, int]:
    """Answer greedily by stock mlx-lm: seconds to the first token, for the rest; KV cache's bytes.

    Raises:
        ValueError, NotImplementedError: mlx-lm cannot quantize this model's cache to `kv_bits`.
    """
    # mlx-lm's own stream is of the device that was the default when it was imported.
    cache, stream = make_prompt_cache(model), mx.default_stream(current_device())
    if kv_bits != 16:
        # A state of constant size has nothing to quantize.
        whole = [getattr(layer, "to_quantized", lambda *_, layer=layer: layer) for layer in cache]
        cache = [quantized(_GROUP, kv_bits) for quantized in whole]
    options: dict[str, Any] = {"prompt_cache": cache, "prefill_step_size": CHUNK}
    with wired_limit(model, [stream]):
        started = time.perf_counter()
        steps = generate_step(mx.array(list(prompt)), model, stream, max_tokens=n, **options)
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        done = time.perf_counter()
        # mlx-lm is one token ahead.
        mx.synchronize(stream)
    return first - started, done - first, sum(getattr(layer, "nbytes", 0) for layer in cache)


def measure_peak(
    base: Model, adapters: Sequence[Adapter], prompt: Sequence[int], n: int, kv_bits: int, runs: int
) -> Json:
    """Measure the most that MLX holds while a model answers with `n` tokens, and its speed.

    All `adapters` are in memory; the first is attached, and stays so. Of several runs the first is
    not timed. Bytes are in the dtype of computation; `counted` are weights and adapters.
    """
    held = [adapter.uniform(base.compute_dtype) for adapter in adapters]
    mx.eval([(lora.a, lora.b) for adapter in held for lora in adapter.modules.values()])
    switch(base.model, held[0] if held else None, base.path)
    # An `Engine` in this process may have replaced mlx-lm's functions by those of d2c-mlx.
    use_fast_exponentials(base.model, False)
    # The attached adapter is among them.
    counted = sum(x.nbytes for _, x in tree_flatten(base.model.parameters()))
    counted += base.compute_dtype.size * sum(map(n_numbers, held[1:]))
    mx.clear_cache()
    outside = mx.get_active_memory() - counted
    mx.reset_peak_memory()
    timings = [generate(base.model, prompt, n, kv_bits) for _ in range(runs)]
    peak, kv_cache = mx.get_peak_memory() - outside, timings[-1][2]
    result = {"context": len(prompt) + n, "kv_bits": kv_bits, "resident": len(held)}
    result |= {"peak": peak, "counted": counted, "kv_cache": kv_cache}
    first, rest, _ = np.median(timings[1:] or timings, axis=0).tolist()
    result |= {"first_token_seconds": first, "prompt_tokens_per_second": len(prompt) / first}
    return result | {"decode_tokens_per_second": (n - 1) / rest}


def fit_memory(points: Sequence[Json], size: int) -> MemoryModel:
    """Draw the lines of KV cache and rest through points of `measure_peak`.

    `size` is that of a number in the dtype of computation, in bytes.
    """
    model = {}
    for kv_bits in dict.fromkeys(point["kv_bits"] for point in points):
        those = [point for point in points if point["kv_bits"] == kv_bits]
        numbers = [point["kv_cache"] / _number_nbytes(kv_bits, size) for point in those]
        rests = [point["peak"] - point["counted"] - point["kv_cache"] for point in those]
        contexts = [point["context"] for point in those]
        model[kv_bits] = {
            name: np.polyfit(contexts, values, 1).tolist()
            for name, values in (("kv_cache", numbers), ("rest", rests))
        }
    return model


def estimate(memory: MemoryModel, context: int, kv_bits: int, size: int) -> int:
    """Bytes of KV cache and rest at a context, where a number that is not quantized has `size`."""
    numbers, rest = (np.polyval(memory[kv_bits][name], context) for name in ("kv_cache", "rest"))
    return round(float(numbers * _number_nbytes(kv_bits, size) + rest))


def _number_nbytes(kv_bits: int, size: int) -> float:
    """Bytes of a number of a KV cache, with its part of scale and offset where it is quantized."""
    return size if kv_bits == 16 else kv_bits / 8 + 2 * size / _GROUP


def n_numbers(adapter: Adapter) -> int:
    """Numbers of an adapter's factors as it is loaded, all of one rank."""
    return sum(lora.a.size + lora.b.size for lora in adapter.uniform().modules.values())
