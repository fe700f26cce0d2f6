"""Times of answers and of adapter changes, within a memory limit."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load
from mlx_lm.generate import generate_step, wired_limit
from mlx_lm.models.cache import make_prompt_cache

from d2c_mlx.models.stock import WITHOUT_CODE
from d2c_mlx.packs.export import export
from d2c_mlx.packs.pack import Pack
from d2c_mlx.phone.stock_model import StockModel
from d2c_mlx.utils.device import current_device
from d2c_mlx.utils.progress import Progress

__all__ = ["measure_speed", "measure_switch", "memory_limit"]

# Timed switches through the pack; each takes little more than one token.
_N_SWITCHES = 10


@contextmanager
def memory_limit(nbytes: int) -> Iterator[None]:
    """Set MLX's memory limit to `nbytes` within the block, and restore it afterwards.

    At the limit MLX waits for running work and drops its buffer cache; it refuses only what the
    machine does not have. So a peak above the limit is measured, not prevented.
    """
    before = mx.set_memory_limit(nbytes)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def measure_speed(
    stock: StockModel, context: int, n_decode: int, runs: int, progress: Progress
) -> tuple[dict[str, Any], dict[str, int]]:
    """Measure greedy generation: medians over the timed runs, after one that is not counted.

    Args:
        stock: the model with the adapter attached.
        context: tokens of the prompt, which are random.
        n_decode: tokens generated after it.
        runs: timed runs.
        progress: told of the tokens done.

    Returns:
        Times (seconds and tokens per second), and bytes: `kv_cache` in the device's dtype; `rest`,
        what MLX held at its peak here besides weights, adapter and KV cache.
    """
    prompt = np.random.default_rng(0).integers(0, stock.vocabulary, context).tolist()
    mx.clear_cache()
    # Weights, adapter, and whatever else this process holds.
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    timings = []
    for _ in range(runs + 1):
        timings.append(_generate(stock.model, prompt, n_decode))
        progress.advance(context + n_decode)
    firsts, rests, caches = zip(*timings[1:])
    first = statistics.median(firsts)
    times = {
        "context": context,
        "first_token_seconds": first,
        "prompt_tokens_per_second": context / first,
        "decode_tokens_per_second": (n_decode - 1) / statistics.median(rests),
    }
    return times, {
        # A cache of another kind is taken as it is here.
        "kv_cache": stock.kv_nbytes(context + n_decode, stock.dtype) or caches[0],
        "rest": mx.get_peak_memory() - before - caches[0],
    }


def _generate(model: nn.Module, prompt: list[int], n: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds for the n - 1 after it, bytes of the KV cache then."""
    # mlx-lm's own stream is of the device that was the default when it was imported.
    cache, stream = make_prompt_cache(model), mx.default_stream(current_device())
    with wired_limit(model, [stream]):
        started = time.perf_counter()
        steps = generate_step(mx.array(prompt), model, stream, max_tokens=n, prompt_cache=cache)
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        done = time.perf_counter()
        # mlx-lm is one token ahead.
        mx.synchronize(stream)
    return first - started, done - first, sum(getattr(layer, "nbytes", 0) for layer in cache)


def measure_switch(stock: StockModel, pack: Pack, runs: int) -> dict[str, Any]:
    """Time from an adapter on disk to the next token under it: our pack beside stock mlx-lm.

    Both go through the pack's tasks in turn, with all files in the page cache; the first switch of
    each is not counted. Stock mlx-lm loads model, tokenizer and unpacked adapter anew.

    Args:
        stock: the model; it has no adapter afterwards.
        pack: verified.
        runs: timed reloads of stock mlx-lm.

    Returns:
        Medians in seconds of each way and its parts, and how many times faster the pack is.
    """
    turns = itertools.cycle(pack.tasks)
    ours = [_through_pack(stock, pack, next(turns)) for _ in range(_N_SWITCHES + 1)]
    stock.attach(None)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "plain"
        places = export(pack, "mlx", directory)
        reloads = itertools.cycle(places.values())
        theirs = [_by_reload(stock, directory, next(reloads)) for _ in range(runs + 1)]
    medians = {"pack": _medians(ours, "read", "attach"), "stock": _medians(theirs, "reload")}
    ready = [times["seconds"] - times["token_seconds"] for times in medians.values()]
    return {
        **medians,
        "ratio": medians["stock"]["seconds"] / medians["pack"]["seconds"],
        "ratio_before_token": ready[1] / ready[0],
    }


def _through_pack(stock: StockModel, pack: Pack, task: str) -> tuple[float, ...]:
    started = time.perf_counter()
    adapter = pack.load(task)
    read = time.perf_counter()
    stock.attach(adapter)
    attached = time.perf_counter()
    return read - started, attached - read, _generate(stock.model, [0], 1)[0]


def _by_reload(stock: StockModel, directory: Path, place: str | None) -> tuple[float, ...]:
    started = time.perf_counter()
    adapter = str(directory / place) if place else None
    model = load(str(stock.path), adapter_path=adapter, **WITHOUT_CODE)[0]
    reloaded = time.perf_counter() - started
    # The token is computed in the same dtype as ours; the cast is not timed.
    if stock.compute_dtype:
        model.set_dtype(stock.compute_dtype)
        mx.eval(model.parameters())
    return reloaded, _generate(model, [0], 1)[0]


def _medians(times: Sequence[tuple[float, ...]], *names: str) -> dict[str, Any]:
    """Medians of every part and of the whole, without the first switch."""
    timed = times[1:]
    parts = [statistics.median(column) for column in zip(*timed)]
    return {
        **{f"{name}_seconds": part for name, part in zip((*names, "token"), parts)},
        "seconds": statistics.median(map(sum, timed)),
        "switches": len(timed),
    }
