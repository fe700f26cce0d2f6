"""A pack on a quantized model as a stand-in for a phone: memory, speed, switching, quality.

    d2c-mlx phone PACK --model M --bits 4 --device iphone-6gb

Bytes, and whether they fit the phone's limits, are the phone's. Times are those of this machine.
"""

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step, wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_config, quantize_model, save

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.adapters.reading import find_adapters, read_adapters
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import BenchMethod, answer_rows, bench_methods, right_answers
from d2c_mlx.evaluate.scorer import Scorer
from d2c_mlx.models.examples import ExampleSet, context_length
from d2c_mlx.models.kernels import use_fast_exponentials
from d2c_mlx.models.model import Model
from d2c_mlx.models.resolve import cached_model, resolve_model, weights_digest
from d2c_mlx.models.rows import Row
from d2c_mlx.models.stock import TEXTS, linear_shapes, load_stock, switch
from d2c_mlx.models.tasks import encode_rows, load_tasks
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.phone.config import PhoneConfig, Profile, find_profile
from d2c_mlx.phone.tables import FORMAT, VERSION
from d2c_mlx.utils.device import current_device, environment
from d2c_mlx.utils.errors import ConfigError, ModelError
from d2c_mlx.utils.files import hash_file
from d2c_mlx.utils.parsing import json_or_none
from d2c_mlx.utils.progress import Progress

# Timed switches through the pack; each takes little more than one token.
_N_SWITCHES = 10
# Held-out rows of a task, as they are and tokenized.
_Tests = Sequence[tuple[Sequence[Row], ExampleSet]]


def bench_phone(config: PhoneConfig, quiet: bool = False) -> dict[str, Any]:
    """Measure a pack on a quantized base model against the limits of a device.

    Use it to decide whether a pack can ship, and what quantizing the base costs. The held-out loss
    on the float base alone is the `bench` stage of a run.

    Args:
        config: what to measure.
        quiet: show no progress.

    Returns:
        A JSON object, see docs/how-to/ios.md: times in seconds, sizes in bytes, losses in nats per
        target token.

    Raises:
        InputError: the problems of pack, model, profile, adapters or tasks.
    """
    device, profile = find_profile(config.device)
    pack = load_pack(Path(config.pack))
    pack.base_directory(config.model, exact=False)
    name, path = quantized_model(config.model, config.bits)
    base = Model(str(path), dequantize=False)
    # An `Engine` in this process may have replaced mlx-lm's functions by those of d2c-mlx.
    use_fast_exponentials(base.model, False)
    methods = _load_methods(config, pack, base)
    positions = context_length(base.config)
    if positions and max(config.contexts) > positions - config.decode:
        raise ConfigError(
            f"contexts: found {', '.join(map(str, config.contexts))}, expected at most"
            f" {positions - config.decode} tokens: the model has {positions} positions, of which"
            f" {config.decode} are generated (--decode)"
        )
    tests: _Tests = ()
    if config.tasks:
        n, tasks = config.test_examples or None, load_tasks(Path(config.tasks), pack.tasks)
        sets = encode_rows(base.encode, tasks, n, held_out=True)
        tests = [(task.test[:n], rows) for task, rows in zip(tasks, sets)]
    files = sorted(path.glob("model*.safetensors"))
    weights: Any = [mx.load(str(file)) for file in files]  # Their numbers are not read.
    about = {
        "name": name,
        "bits": (base.config.get("quantization") or {}).get("bits"),
        "file_nbytes": sum(file.stat().st_size for file in files),
        "weights_nbytes": sum(x.nbytes for tensors in weights for x in tensors.values()),
        "dtype": str(base.dtype).removeprefix("mlx.core."),
        "compute_dtype": str(base.compute_dtype).removeprefix("mlx.core."),
    }
    # mlx-lm prints warnings of its own; standard output is for the result.
    with contextlib.redirect_stdout(sys.stderr), Progress(not quiet).section("phone") as progress:
        measured = {
            method: _measure_method(base, about, profile, served, config, progress)
            for method, served in methods.items()
        }
        switches = _measure_switch(base, pack)
        quality = _measure_quality(config, base, methods, tests, progress) if tests else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": about,
        "pack": {
            "path": str(pack.path),
            "manifest_sha256": hash_file(pack.path / MANIFEST),
            "storage": pack.storage,
            "nbytes": pack.nbytes,
            "n_tasks": len(pack.tasks),
        },
        "device": {"name": device, **dict(profile)},
        "options": config.model_dump(mode="json"),
        "methods": measured,
        "switch": switches,
        "quality": quality,
        "provenance": environment(),
    }


def quantized_model(spec: str | None, bits: int | None) -> tuple[str, Path]:
    """Find a base model; mlx-lm quantizes it into the cache if it is not as asked, once.

    Args:
        spec: see `models.resolve.resolve_model`.
        bits: 4 or 8; None takes the model as it is.

    Returns:
        Its name, and the mlx-lm directory of the quantized model.

    Raises:
        ModelError: no such model, or it has other bits already.
    """
    name, path = resolve_model(spec)
    config = json_or_none(path / "config.json")
    about = config if isinstance(config, dict) else {}  # mlx-lm says what is wrong with it.
    quantization = about.get("quantization", about.get("quantization_config"))
    stored = quantization.get("bits", "unknown") if isinstance(quantization, dict) else None
    if bits in (None, stored):
        return name, path
    if stored:
        raise ModelError(
            f"{path}: its weights have {stored} bits already, expected weights that are not"
            f" quantized for --bits {bits}; leave --bits out"
        )
    # They decide how weights are read, and are copied with them.
    beside = [
        (file.name, hash_file(file))
        for file in sorted(path.iterdir())
        if file.suffix in TEXTS and file.is_file()
    ]
    parts = [weights_digest(path), beside, bits, version("mlx-lm"), "v3"]

    def write(directory: Path) -> None:
        model, tokenizer = load_stock(path, lazy=True)
        shapes = linear_shapes(model.named_modules()).values()
        # Of a width that no group divides mlx-lm leaves the weights as they are.
        size = 64 if all(width % 64 == 0 for width, _ in shapes) else 32
        with contextlib.redirect_stdout(sys.stderr):
            model, config = quantize_model(model, load_config(path), size, bits)
            save(directory, path, model, tokenizer, config)

    return name, cached_model(f"{path.name}-{bits}bit", parts, write)


def _load_methods(config: PhoneConfig, pack: Pack, base: Model) -> dict[str, BenchMethod]:
    """Adapters that serve each task: none, its task adapter if `adapters` is given, the pack's."""
    packed = {task: pack.load(task) for task in pack.tasks}
    for adapter in filter(None, packed.values()):
        check_adapter(adapter, base.module_shapes, pack.path)
    methods = {"base": BenchMethod(0, [dict.fromkeys(packed)])}
    if config.adapters:
        sources = {source.name: source for source in find_adapters(config.adapters)}
        missing = sorted(packed.keys() - sources.keys())
        if missing:
            raise ConfigError(
                f"adapters: {config.adapters} has none for {', '.join(missing)}, which the pack"
                " serves; give the directory that the pack was made of"
            )
        adapters = read_adapters(
            [sources[task] for task in packed], base.module_shapes, base.config
        )
        served = {adapter.name: adapter.uniform(base.dtype) for adapter in adapters}
        nbytes = sum(adapter.nbytes(base.n_layers) for adapter in served.values())
        methods["individual"] = BenchMethod(nbytes, [served])
    return {**methods, "pack": BenchMethod(pack.nbytes, [packed])}


def _attach(base: Model, adapter: Adapter | None) -> None:
    """Put mlx-lm's own LoRA layers beside the weights; fused sums would be quantized again."""
    switch(base.model, adapter and adapter.uniform(base.compute_dtype), base.path)


def _measure_method(
    base: Model,
    about: Mapping[str, Any],
    profile: Profile,
    method: BenchMethod,
    config: PhoneConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Speed at every context, and memory and storage against the profile's limits.

    Speeds are medians of greedy generation after a random prompt, the largest adapter attached;
    `kv_cache` is in the device's dtype, `rest` is what MLX held at its peak here besides.
    """

    def factor_nbytes(adapter: Adapter | None) -> int:
        loras = adapter.modules.values() if adapter else ()
        return sum(lora.a.nbytes + lora.b.nbytes for lora in loras)

    def against(nbytes: int, limit: int) -> dict[str, Any]:
        return {"limit": limit, "fits": nbytes <= limit, "margin": limit - nbytes}

    (served,) = method.variants
    adapter = max(filter(None, served.values()), key=factor_nbytes, default=None)
    _attach(base, adapter)
    contexts, n_decode = config.contexts, config.decode
    progress.expect(sum(n + n_decode for n in contexts) * (config.runs + 1))
    speeds, memory = [], []
    for context in contexts:
        prompt = np.random.default_rng(0).integers(0, base.dimensions[1], context).tolist()
        mx.clear_cache()
        # Weights, adapter, and whatever else this process holds.
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        timings = []
        for _ in range(config.runs + 1):
            timings.append(_generate(base.model, prompt, n_decode))
            progress.advance(context + n_decode)
        firsts, rests, caches = zip(*timings[1:])
        first = statistics.median(firsts)
        speeds.append({
            "context": context,
            "first_token_seconds": first,
            "prompt_tokens_per_second": context / first,
            "decode_tokens_per_second": (n_decode - 1) / statistics.median(rests),
        })  # fmt: skip
        parts = {
            "weights": about["weights_nbytes"],
            "adapter": factor_nbytes(adapter),
            "kv_cache": caches[0] * base.dtype.size // base.compute_dtype.size,
            "rest": mx.get_peak_memory() - held - caches[0],
        }
        peak = sum(parts.values())
        memory.append({"context": context, **parts, "peak": peak, **against(peak, profile.memory)})
    stored = about["file_nbytes"] + method.nbytes
    return {
        "nbytes": method.nbytes,
        "adapter": adapter and {"name": adapter.name, "rank": adapter.rank},
        "contexts": speeds,
        "memory": memory,
        "storage": {"nbytes": stored, **against(stored, profile.storage)},
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


def _measure_switch(base: Model, pack: Pack) -> dict[str, Any]:
    """Time from an adapter on disk to the next token under it; medians over the pack's tasks.

    Files are in the page cache, and the first change is not counted.
    """
    changes, turns = [], itertools.cycle(pack.tasks)
    for _ in range(_N_SWITCHES + 1):
        started = time.perf_counter()
        adapter = pack.load(next(turns))
        read = time.perf_counter()
        _attach(base, adapter)
        parts = {"read_seconds": read - started, "attach_seconds": time.perf_counter() - read}
        changes.append({**parts, "token_seconds": _generate(base.model, [0], 1)[0]})
    _attach(base, None)
    medians = {part: statistics.median(x[part] for x in changes[1:]) for part in changes[0]}
    whole = statistics.median(sum(x.values()) for x in changes[1:])
    return {**medians, "seconds": whole, "switches": _N_SWITCHES}


def _measure_quality(
    config: PhoneConfig,
    base: Model,
    methods: Mapping[str, BenchMethod],
    tests: _Tests,
    progress: Progress,
) -> dict[str, Any]:
    """Losses, scores of answers and gains, on the quantized base and on a float base."""
    bases = {"device": base, "float": Model(config.model, dequantize=True)}
    losses: dict[str, dict[str, Any]] = {}
    for where, model in bases.items():
        scorer = Scorer(Engine(model), progress=progress)
        losses[where] = bench_methods(scorer, methods, [rows for _, rows in tests])
        answers = answer_rows(model, methods, tests, progress)
        for name, share in right_answers(answers, list(methods)).items():
            losses[where][name]["right"] = share
    gain = {where: loss["base"]["loss"] - loss["pack"]["loss"] for where, loss in losses.items()}
    unchanged = bases["float"].path == base.path and base.config.get("quantization")
    return {
        **losses,
        "float_weights": "dequantized" if unchanged else "original",
        "float_dtype": str(bases["float"].compute_dtype).removeprefix("mlx.core."),
        "gain": gain,
        "kept_gain": gain["device"] / gain["float"] if gain["float"] > 1e-6 else None,
        "n_rows": [len(rows) for rows, _ in tests],
    }
