"""A pack on a quantized model as a stand-in for a phone: memory, speed, switching, quality.

    d2c-mlx phone PACK --model M --bits 4 --device iphone-6gb

Bytes, and whether they fit the phone's limits, are the phone's. Times are those of this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import BaseWeights, check_adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.adapters.sources import find_adapters
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import encode
from d2c_mlx.models.resolve import check_named
from d2c_mlx.models.tasks import encode_tests, load_tasks
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.phone.config import CONTEXTS, PhoneConfig
from d2c_mlx.phone.profiles import Profile, find_profile
from d2c_mlx.phone.quality import HeldOutRows, measure_quality
from d2c_mlx.phone.result import FORMAT
from d2c_mlx.phone.stock_model import StockModel, quantized_model
from d2c_mlx.phone.timing import measure_speed, measure_switch, memory_limit
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.errors import ConfigError, gather
from d2c_mlx.utils.files import fingerprint, hash_file
from d2c_mlx.utils.progress import Progress

__all__ = ["bench_phone"]

_INCLUDES = (
    "first token: prefill and one decode step, the model loaded, one sequence, greedy; decode: the"
    " tokens after it; medians after one run that is not counted; switch: reading the adapter from"
    " the pack (files in the page cache, the pack verified before), attaching it, one token of a"
    " one-token prompt; stock: mlx_lm.load with adapter_path (tokenizer included), the same token;"
    " memory: weights, adapter and KV cache in the model's dtype, the rest of MLX's peak as"
    " measured in compute_dtype, not the app around it"
)


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
    profile, pack = find_profile(config.device), load_pack(Path(config.pack))
    check_named(pack.manifest.model, config.model)
    name, source, path = quantized_model(config.model, config.bits)
    pack.check_weights(source)
    stock = StockModel(path)
    methods = _load_methods(config, pack, stock, source)
    config = config.replace(contexts=_fitting_contexts(config, stock))
    tests = _load_tests(config, pack, stock)
    # mlx-lm prints warnings of its own; standard output is for the result.
    with contextlib.redirect_stdout(sys.stderr), Progress(not quiet).section("phone") as bar:
        with memory_limit(profile.memory):
            measured = {
                name: _measure_method(stock, profile, method, config, bar)
                for name, method in methods.items()
            }
            switches = measure_switch(stock, pack, config.runs)
        quality = measure_quality(config.model, stock, methods, tests, bar) if tests else None
    return {
        "format": FORMAT,
        "version": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": _describe_model(name, source, stock, pack),
        "pack": _describe_pack(pack),
        "device": dataclasses.asdict(profile),
        "options": config.model_dump(mode="json"),
        "methods": measured,
        "switch": switches,
        "quality": quality,
        "provenance": {**environment(), "includes": _INCLUDES},
    }


def _describe_model(name: str, source: Path, stock: StockModel, pack: Pack) -> dict[str, Any]:
    """The base model as the user named it, and as it ran."""
    quantization = stock.config.get("quantization") or {}
    return {
        "name": name,
        "bits": stock.bits,
        "group_size": quantization.get("group_size"),
        "source_sha256": fingerprint(
            [
                [file.name, hash_file(file)]
                for file in (source / "config.json", *sorted(source.glob("model*.safetensors")))
            ]
        ),
        "file_nbytes": stock.file_nbytes,
        "weights_nbytes": stock.weights_nbytes,
        "dtype": _dtype(stock.dtype),
        "compute_dtype": _dtype(stock.compute_dtype),
        "pack_was_made_for": pack.manifest.model,
    }


def _describe_pack(pack: Pack) -> dict[str, Any]:
    return {
        "path": str(pack.path),
        "manifest_sha256": hash_file(pack.path / MANIFEST),
        "storage": pack.storage,
        "nbytes": pack.nbytes,
        "n_tasks": len(pack.tasks),
    }


def _dtype(dtype: mx.Dtype | None) -> str:
    return str(dtype).split(".")[-1]


def _load_methods(
    config: PhoneConfig, pack: Pack, stock: StockModel, source: Path
) -> dict[str, BenchMethod]:
    """Adapters that serve each task: none, its task adapter if `adapters` is given, the pack's."""
    packed = {task: pack.load(task) for task in pack.tasks}
    for adapter in packed.values():
        if adapter:
            check_adapter(adapter, stock.module_shapes, pack.path)
    methods = {"base": BenchMethod(0, [dict.fromkeys(packed)])}
    if config.adapters:
        sources = {source.name: source for source in find_adapters(config.adapters)}
        missing = sorted(packed.keys() - sources.keys())
        if missing:
            raise ConfigError(
                f"adapters: {config.adapters} has none for {', '.join(missing)}, which the pack"
                " serves; give the directory that the pack was made of"
            )
        # Before it was quantized: what an adapter stores in full is of that model.
        model = cache(partial(BaseModel, str(source), lazy=True))
        own = BaseWeights(lambda path: model().weight(path))
        found = gather(
            partial(read_adapter, sources[task].path, stock.module_shapes, stock.config, own)
            for task in packed
        )
        served = {task: one.uniform(stock.dtype or mx.float16) for task, one in zip(packed, found)}
        nbytes = sum(adapter.nbytes(stock.n_layers) for adapter in served.values())
        methods["individual"] = BenchMethod(nbytes, [served])
    return {**methods, "pack": BenchMethod(pack.nbytes, [packed])}


def _fitting_contexts(config: PhoneConfig, stock: StockModel) -> tuple[int, ...]:
    """Prompt lengths that leave room to decode; ConfigError if one that is asked does not."""
    most = stock.max_tokens
    room = None if most is None else most - config.decode
    wanted = config.contexts or CONTEXTS
    fitting = tuple(n for n in wanted if room is None or n <= room)
    if not fitting or (config.contexts and fitting != tuple(wanted)):
        raise ConfigError(
            f"contexts: found {', '.join(map(str, wanted))}, expected at most {room} tokens: the"
            f" model has {most} positions, of which {config.decode} are generated (--decode)"
        )
    return fitting


def _largest_adapter(method: BenchMethod) -> Adapter | None:
    """The adapter with most bytes of those that serve tasks."""
    (served,) = method.variants
    return max((one for one in served.values() if one), key=_factor_nbytes, default=None)


def _factor_nbytes(adapter: Adapter | None) -> int:
    """Bytes of the factors in memory."""
    loras = adapter.modules.values() if adapter else ()
    return sum(lora.a.nbytes + lora.b.nbytes for lora in loras)


def _measure_method(
    stock: StockModel, profile: Profile, method: BenchMethod, config: PhoneConfig, bar: Progress
) -> dict[str, Any]:
    """Speed at every context, and memory and storage against the profile's limits."""
    adapter, contexts = _largest_adapter(method), config.contexts
    assert contexts
    stock.attach(adapter)
    bar.expect(sum(n + config.decode for n in contexts) * (config.runs + 1))
    found = [measure_speed(stock, n, config.decode, config.runs, bar) for n in contexts]
    fixed = {"weights": stock.weights_nbytes, "adapter": _factor_nbytes(adapter)}
    stored = stock.file_nbytes + method.nbytes
    return {
        "nbytes": method.nbytes,
        "adapter": adapter and {"name": adapter.name, "rank": adapter.rank},
        "contexts": [times for times, _ in found],
        "memory": [
            {"context": times["context"], **_peak({**fixed, **grown}, profile)}
            for times, grown in found
        ],
        "storage": {"nbytes": stored, **_against_limit(stored, profile.storage)},
    }


def _against_limit(nbytes: int, limit: int) -> dict[str, Any]:
    return {"limit": limit, "fits": nbytes <= limit, "margin": limit - nbytes}


def _peak(parts: Mapping[str, int], profile: Profile) -> dict[str, Any]:
    """Bytes on the device by part, and their sum; `rest` is activations and logits as run here."""
    peak = sum(parts.values())
    return {**parts, "peak": peak, **_against_limit(peak, profile.memory)}


def _load_tests(config: PhoneConfig, pack: Pack, stock: StockModel) -> list[HeldOutRows]:
    """Held-out rows of every task that the pack serves; empty without `tasks`."""
    if not config.tasks:
        return []
    n, answers = config.test_examples or None, config.answers
    tasks = load_tasks(Path(config.tasks), pack.tasks)
    encoded = encode_tests(partial(encode, stock.tokenizer, context=stock.max_tokens), tasks, n)
    return [HeldOutRows(one, task.test[:n][:answers]) for one, task in zip(encoded, tasks)]
