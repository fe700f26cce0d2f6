"""A pack on a quantized model as a stand-in for a phone: memory, speed, switching, quality.

    d2c-mlx bench PACK --model M --bits 4 --device iphone-6gb

Times are those of this machine; what is a phone's are bytes, and whether they fit its profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.mlx_format import check_adapter
from d2c_mlx.adapters.peft_format import read_adapter
from d2c_mlx.adapters.sources import find_adapters
from d2c_mlx.evaluate.heldout import Method
from d2c_mlx.models.tasks import load_tasks
from d2c_mlx.models.tokenize import encode, encode_tests
from d2c_mlx.packs.pack import MANIFEST, Pack, load_pack
from d2c_mlx.phone.config import CONTEXTS, PhoneConfig
from d2c_mlx.phone.profiles import Profile, find_profile
from d2c_mlx.phone.quality import HeldOut, measure_quality
from d2c_mlx.phone.result import FORMAT
from d2c_mlx.phone.stock_model import StockModel, quantized_model
from d2c_mlx.phone.timing import memory_limit, speed, switch
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.errors import ConfigError, gather
from d2c_mlx.utils.files import fingerprint, hash_file
from d2c_mlx.utils.progress import Bar, progress_bar

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
    """Measure; returns a JSON object, see docs/phone.md.

    Raises:
        InputError: the problems of pack, model, profile, adapters or tasks.
    """
    profile, pack = find_profile(config.device), load_pack(Path(config.pack))
    name, source, path = quantized_model(config.model, config.bits)
    stock = StockModel(path)
    methods = _methods(config, pack, stock)
    contexts = _contexts(config, stock)
    tests = _tests(config, pack, stock)
    # mlx-lm prints warnings of its own, and standard output is for the result.
    with contextlib.redirect_stdout(sys.stderr), progress_bar("bench", quiet) as bar:
        with memory_limit(profile.memory):
            measured = {
                name: _method(stock, profile, method, contexts, config, bar)
                for name, method in methods.items()
            }
            switches = switch(stock, pack, config.runs)
        quality = measure_quality(config.model, stock, methods, tests, bar) if tests else None
    return {
        "format": FORMAT,
        "version": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": _about_model(name, source, stock, pack),
        "pack": {
            "path": str(pack.path),
            "manifest_sha256": hash_file(pack.path / MANIFEST),
            "storage": pack.storage,
            "nbytes": pack.nbytes,
            "n_tasks": len(pack.tasks),
        },
        "device": dataclasses.asdict(profile),
        "options": {**config.model_dump(), "contexts": list(contexts)},
        "methods": measured,
        "switch": switches,
        "quality": quality,
        "provenance": {**environment(), "includes": _INCLUDES},
    }


def _about_model(name: str, source: Path, stock: StockModel, pack: Pack) -> dict[str, Any]:
    """Of the model as the user named it, and as it ran."""
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
        "pack_was_made_for": pack.manifest["base"]["model"],
    }


def _dtype(dtype: mx.Dtype | None) -> str:
    return str(dtype).split(".")[-1]


def _methods(config: PhoneConfig, pack: Pack, stock: StockModel) -> dict[str, Method]:
    """What serves each task: nothing, its own adapter if there is one, the pack."""
    packed = {task: pack.load(task) for task in pack.tasks}
    for adapter in packed.values():
        if adapter:
            check_adapter(adapter, stock.module_shapes, pack.path)
    methods = {"base": Method(0, [dict.fromkeys(packed)])}
    if config.adapters:
        sources = {source.name: source for source in find_adapters(config.adapters)}
        missing = sorted(packed.keys() - sources.keys())
        if missing:
            raise ConfigError(
                f"adapters: {config.adapters} has none for {', '.join(missing)}, which the pack"
                " serves; give the directory that the pack was made of"
            )
        found = gather(
            partial(read_adapter, sources[task].path, stock.module_shapes, stock.config)
            for task in packed
        )
        own = {task: one.uniform(stock.dtype or mx.float16) for task, one in zip(packed, found)}
        nbytes = sum(adapter.nbytes(stock.n_layers) for adapter in own.values())
        methods["individual"] = Method(nbytes, [own])
    return {**methods, "pack": Method(pack.nbytes, [packed])}


def _contexts(config: PhoneConfig, stock: StockModel) -> tuple[int, ...]:
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


def _largest(method: Method) -> Adapter | None:
    """The adapter that costs most, of those that serve tasks."""
    (served,) = method.variants
    return max((one for one in served.values() if one), key=_nbytes, default=None)


def _nbytes(adapter: Adapter | None) -> int:
    """Bytes of the factors in memory."""
    loras = adapter.modules.values() if adapter else ()
    return sum(lora.a.nbytes + lora.b.nbytes for lora in loras)


def _method(
    stock: StockModel,
    profile: Profile,
    method: Method,
    contexts: Sequence[int],
    config: PhoneConfig,
    bar: Bar,
) -> dict[str, Any]:
    """Speed at every context, and memory and storage against the profile's limits."""
    adapter = _largest(method)
    stock.attach(adapter)
    bar.expect(sum(n + config.decode for n in contexts) * (config.runs + 1))
    found = [speed(stock, n, config.decode, config.runs, bar) for n in contexts]
    fixed = {"weights": stock.weights_nbytes, "adapter": _nbytes(adapter)}
    stored = stock.file_nbytes + method.nbytes
    return {
        "nbytes": method.nbytes,
        "adapter": adapter and {"name": adapter.name, "rank": adapter.rank},
        "contexts": [times for times, _ in found],
        "memory": [
            {"context": times["context"], **_memory({**fixed, **grown}, profile)}
            for times, grown in found
        ],
        "storage": {"nbytes": stored, **_fit(stored, profile.storage)},
    }


def _fit(nbytes: int, limit: int) -> dict[str, Any]:
    return {"limit": limit, "fits": nbytes <= limit, "margin": limit - nbytes}


def _memory(parts: Mapping[str, int], profile: Profile) -> dict[str, Any]:
    """By component, in bytes on the device; rest is activations and logits, as measured here."""
    peak = sum(parts.values())
    return {**parts, "peak": peak, **_fit(peak, profile.memory)}


def _tests(config: PhoneConfig, pack: Pack, stock: StockModel) -> list[HeldOut]:
    """Held-out rows of every task that the pack serves; none without `tasks`."""
    if not config.tasks:
        return []
    n, answers = config.test_examples or None, config.answers
    tasks = load_tasks(Path(config.tasks), pack.tasks)
    encoded = encode_tests(partial(encode, stock.tokenizer, context=stock.max_tokens), tasks, n)
    return [HeldOut(one, task.test[:n][:answers]) for one, task in zip(encoded, tasks)]
