"""Packs on a quantized model as a stand-in for phones: quality, memory, speed, change of adapter.

    d2c-mlx phone PACK... --bits 16,4 --adapters loras --tasks tasks

Bytes, and whether they fit a device's limits, are the device's. Times are those of this machine.
"""

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_adapter
from d2c_mlx.adapters.reading import find_adapters, read_adapters
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.heldout import BenchMethod, answer_rows, bench_methods, right_answers
from d2c_mlx.evaluate.scorer import LossCache, Scorer
from d2c_mlx.models.examples import ExampleSet, context_length
from d2c_mlx.models.model import Model
from d2c_mlx.models.rows import Row
from d2c_mlx.models.stock import switch
from d2c_mlx.models.tasks import encode_rows, load_tasks
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.phone.config import PhoneConfig, find_profiles
from d2c_mlx.phone.memory import (
    CHUNK,
    KV_BITS,
    estimate,
    fit_memory,
    generate,
    measure_peak,
    n_numbers,
)
from d2c_mlx.phone.quantized import quantized_model
from d2c_mlx.phone.sweep import judge, sweep
from d2c_mlx.phone.tables import FORMAT, VERSION
from d2c_mlx.utils.device import environment
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import ConfigError, warn
from d2c_mlx.utils.files import hash_file
from d2c_mlx.utils.progress import Progress

# Timed changes of adapter through a pack; each takes little more than one token.
_N_SWITCHES = 10
# Held-out rows of a task: those to answer as they are, and all tokenized.
_Tests = Sequence[tuple[Sequence[Row], ExampleSet]]
Json = dict[str, Any]


def bench_phone(config: PhoneConfig, quiet: bool = False) -> Json:
    """Measure which packs can ship on which devices, and what quantizing the base costs.

    Args:
        config: what to measure.
        quiet: show no progress.

    Returns:
        A JSON object, see docs/how-to/ios.md: times in seconds, sizes in bytes, losses in nats per
        target token.

    Raises:
        InputError: the problems of packs, model, profile, adapters or tasks.
    """
    profiles, packs = find_profiles(config.device), _load_packs(config)
    forms = [quantized_model(config.model, bits) for bits in config.bits or (None,)]
    bases = {about["bits"]: about for *_, about in forms}
    model_name, path, about = forms[-1]
    base = Model(str(path))
    positions = context_length(base.config) or max(config.contexts)
    contexts = [n for n in config.contexts if 2 * config.decode < n <= positions]
    if not contexts:
        raise ConfigError(
            f"contexts: found {', '.join(map(str, config.contexts))}, expected more than"
            f" {2 * config.decode} tokens, twice --decode, and at most the model's {positions}"
        )
    for pack in packs.values():
        if pack.manifest.config_hash != base.config_hash:
            warn(
                f"{pack.path}: made on {pack.manifest.model}, another base than this in"
                f" {about['bits']} bits; for this one make it again with d2c-mlx run --model {path}"
            )
    methods = _load_methods(config, packs, base)
    tests, tokens = _load_rows(config, base, methods["base"].variants[0])
    size, compute = base.dtype.size, base.compute_dtype
    served: dict[str, list[Adapter]] = {}  # each once, the largest first
    for name, method in itertools.islice(methods.items(), 1, None):
        distinct = {adapter.digest: adapter for adapter in method.variants[0].values() if adapter}
        served[name] = sorted(distinct.values(), key=n_numbers, reverse=True)
    sizes = {name: [size * n_numbers(adapter) for adapter in served[name]] for name in served}
    adapters = served[max(packs, key=lambda name: sum(sizes[name]))]
    # mlx-lm prints warnings of its own; standard output is for the result.
    with contextlib.redirect_stdout(sys.stderr), Progress(not quiet).section("phone") as progress:
        measure = partial(_measure_peaks, adapters, tokens, config, progress)
        peaks = measure(base, about["bits"], contexts)
        memory = fit_memory([peak for peak in peaks if peak["fitted"]], compute.size)
        switches = {name: _measure_switch(base, pack) for name, pack in packs.items()}
        del base
        for _, path, about in forms[:-1]:
            peaks += measure(Model(str(path)), about["bits"], contexts, alone=True)
        quality = {}
        for _, path, about in forms if tests else ():
            quality[about["bits"]] = _measure_quality(path, methods, tests, progress)
    for peak in peaks:
        beside = estimate(memory, peak["context"], peak["kv_bits"], compute.size)
        peak["error"] = (peak["counted"] + beside) / peak["peak"] - 1
    error = max(abs(peak["error"]) for peak in peaks if not peak["fitted"])
    _tell_effects(quality)
    nbytes = {name: methods[name].nbytes for name in sizes}
    rows = sweep(bases, nbytes, sizes, memory, contexts, size)
    return {
        "format": FORMAT,
        "version": VERSION,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": model_name, "compute_dtype": str(compute).removeprefix("mlx.core.")},
        "bases": bases,
        "packs": {
            name: {
                "path": str(pack.path),
                "manifest_sha256": hash_file(pack.path / MANIFEST),
                "storage": pack.storage,
                "nbytes": pack.nbytes,
                "n_tasks": len(pack.tasks),
                "adapters_nbytes": sizes[name],
            }
            for name, pack in packs.items()
        },
        "devices": {
            name: {**dict(profile), **judge(rows, dict(profile), quality)}
            for name, profile in profiles.items()
        },
        "options": config.model_dump(mode="json"),
        "contexts": contexts,
        "memory": {"chunk": CHUNK, "lines": memory, "peaks": peaks, "error": error},
        "sweep": rows,
        "switch": switches,
        "quality": quality,
        "n_rows": [len(rows.examples) for _, rows in tests],
        "provenance": environment(),
    }


def _load_packs(config: PhoneConfig) -> dict[str, Pack]:
    """Name -> pack; the name is that of its directory or, of a run's pack, of the run."""
    packs: dict[str, Pack] = {}
    for pack in map(load_pack, config.packs):
        pack.base_directory(config.model, exact=False)
        path = pack.path.resolve()
        name = path.parent.name if path.name == "pack" else path.name
        taken = name in (*packs, "base", "individual")
        packs[f"{name}-{len(packs) + 1}" if taken else name] = pack
    return packs


def _load_methods(
    config: PhoneConfig, packs: Mapping[str, Pack], base: Model
) -> dict[str, BenchMethod]:
    """Adapters that serve each task: none, its task adapter if `adapters` is given, the packs'."""
    tasks = sorted({task for pack in packs.values() for task in pack.tasks})
    methods = {"base": BenchMethod(0, [dict.fromkeys(tasks)])}
    if config.adapters:
        sources = {source.name: source for source in find_adapters(config.adapters)}
        if missing := [task for task in tasks if task not in sources]:
            raise ConfigError(
                f"adapters: {config.adapters} has none for {', '.join(missing)}, which the pack"
                " serves; give the directory that the pack was made of"
            )
        adapters = read_adapters([sources[task] for task in tasks], base.module_shapes, base.config)
        own = {adapter.name: adapter.uniform(base.dtype) for adapter in adapters}
        nbytes = sum(adapter.nbytes(base.n_layers) for adapter in own.values())
        methods["individual"] = BenchMethod(nbytes, [own])
    for name, pack in packs.items():
        served = {task: pack.load(task) for task in tasks}
        for adapter in filter(None, served.values()):
            check_adapter(adapter, base.module_shapes, pack.path)
        methods[name] = BenchMethod(pack.nbytes, [served])
    return methods


def _load_rows(config: PhoneConfig, base: Model, names: Iterable[str]) -> tuple[_Tests, list[int]]:
    """Held-out rows, and the tokens of prompts: those of the rows, random ones without rows."""
    if not config.tasks:
        return (), np.random.default_rng(0).integers(0, base.dimensions[1], 1024).tolist()
    n, tasks = config.test_examples or None, load_tasks(Path(config.tasks), names)
    sets = encode_rows(base.encode, tasks, n, held_out=True)
    tests = [(task.test[:n][: config.answers], rows) for task, rows in zip(tasks, sets)]
    return tests, [x for rows in sets for row in rows.examples for x in row.tokens]


def _measure_peaks(
    adapters: Sequence[Adapter], tokens: Sequence[int], config: PhoneConfig, progress: Progress,
    base: Model, bits: str, contexts: Sequence[int], alone: bool = False,
) -> list[Json]:  # fmt: skip
    """Measure peaks on one form of the base; if `alone`, at the shortest context only.

    That, half and twice of it are `fitted`. Longer contexts check the fit, and so do all adapters
    in memory. Quantized caches are checked at one of them, because they are slow on a CPU.
    """
    first, *longer = contexts
    twice = min(2 * first, contexts[-1])
    # Context, bits of the KV cache, loaded adapters; how often.
    todo = [(first, 16, 1, 1 + config.runs)]
    for kv_bits in () if alone else KV_BITS:
        more = {*longer} if kv_bits == 16 else {first, *longer[:1]}
        todo += [(n, kv_bits, 1, 1) for n in sorted({first // 2, twice, *more})]
    todo += [] if alone else [(first, 16, len(adapters), 1)]
    progress.expect(sum(context * runs for context, *_, runs in todo))
    peaks = []
    for context, kv_bits, n, runs in todo:
        prompt = np.resize(np.array(tokens), context - config.decode).tolist()
        fitted = not alone and n == 1 and context <= twice
        # mlx-lm quantizes no window, and no width that its groups do not divide.
        unable = (ValueError, NotImplementedError) if kv_bits != 16 else ()
        with contextlib.suppress(*unable):
            peak = measure_peak(base, adapters[:n], prompt, config.decode, kv_bits, runs)
            peaks.append({"bits": bits, "fitted": fitted, **peak})
        progress.advance(context * runs)
    return peaks


def _measure_switch(base: Model, pack: Pack) -> Json:
    """Time from an adapter in the page cache to the next token under it: medians, but the first."""
    changes = []
    for _, task in zip(range(_N_SWITCHES + 1), itertools.cycle(pack.tasks)):
        started = time.perf_counter()
        adapter = pack.load(task)
        read = time.perf_counter()
        switch(base.model, adapter and adapter.uniform(base.compute_dtype), base.path)
        parts = {"read_seconds": read - started, "attach_seconds": time.perf_counter() - read}
        changes.append({**parts, "token_seconds": generate(base.model, [0], 1)[0]})
    switch(base.model, None, base.path)
    medians = {part: statistics.median(x[part] for x in changes[1:]) for part in changes[0]}
    whole = statistics.median(sum(x.values()) for x in changes[1:])
    return {**medians, "seconds": whole, "switches": len(changes) - 1}


def _measure_quality(
    path: Path, methods: Mapping[str, BenchMethod], tests: _Tests, progress: Progress
) -> Json:
    """Losses and right answers of every method on one form of the base model."""
    base = Model(str(path))
    scorer = Scorer(Engine(base), LossCache(cache_directory() / "losses.sqlite"), progress)
    result = bench_methods(scorer, methods, [rows for _, rows in tests])
    answers = answer_rows(base, methods, tests, progress)
    for name, share in right_answers(answers, list(methods)).items():
        result[name]["right"] = share
    return result


def _tell_effects(quality: Mapping[str, Json]) -> None:
    """Add what quantizing takes, and the share of the task adapters' gain at 16 bits that is kept.

    What a pack takes on top is there: `excess`, over the task adapters at the same bits.
    """
    whole = {name: result["loss"] for name, result in quality.get("16", {}).items()}
    gain = whole["base"] - whole["individual"] if "individual" in whole else 0
    for results in quality.values():
        for name, result in results.items():
            result["quantizing"] = result["loss"] - whole[name] if whole else None
            result["kept"] = (whole["base"] - result["loss"]) / gain if gain > 1e-6 else None
