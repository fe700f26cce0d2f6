"""The device that MLX computes on, this machine, and the versions that results depend on.

Every decision that differs between Metal and a CPU asks this file, so that tests can describe the
other device; only `environment.py` knows Linux beside it.
"""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.utils.environment import blas_build, loaded_blas
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.parsing import bytes_of

# Packages that results depend on.
_PACKAGES = ("d2c-mlx", "mlx", "mlx-lm", "numpy", "safetensors", "transformers", "scikit-learn")
# Read once: every loss that is looked up asks.
_MLX, _MACOS = version("mlx"), platform.mac_ver()[0]
# Steps of `outside_mlx`.
_STEP = 256 << 20


def use_device() -> None:
    """Compute on the CPU, in float32, if `$D2C_MLX_DEVICE` is `cpu`.

    Raises:
        ConfigError: the variable has any other value.
    """
    wish = os.environ.get("D2C_MLX_DEVICE")
    if wish not in (None, "", "cpu"):
        raise ConfigError(f"D2C_MLX_DEVICE: found {wish!r}, expected cpu, or nothing for the GPU")
    if wish:
        mx.set_default_device(mx.cpu)


def current_device() -> mx.Device:
    """The device that MLX computes on where none is named."""
    return mx.default_device()


def on_cpu() -> bool:
    """True where float32 is fast and 16 bits are slow, and elementwise work takes one core."""
    return current_device().type == mx.DeviceType.cpu


def evaluation_memory(n_processes: int = 1) -> int:
    """Bytes that an evaluation may take beside what Python holds.

    With `$D2C_MLX_MEMORY_LIMIT` what it leaves of the process's memory, else a share of most of
    Metal's recommended working set, or of half the RAM.

    Args:
        n_processes: number of processes that share this machine's memory.

    Raises:
        ConfigError: the variable is no size in bytes.
    """
    if limit := os.environ.get("D2C_MLX_MEMORY_LIMIT"):
        nbytes = bytes_of(limit)
        if nbytes is None:
            raise ConfigError(
                f'D2C_MLX_MEMORY_LIMIT: found {limit!r}, expected a size such as "3GB" or "800MB"'
            )
        return max(1, nbytes - outside_mlx())
    working_set = mx.device_info().get("max_recommended_working_set_size")
    nbytes = int(working_set) * 4 // 5 if working_set else _system_memory() // 2
    return nbytes // n_processes


def wire(limit: int) -> None:
    """Keep at most `limit` bytes from being paged out and in again between batches, on Metal."""
    if most := mx.device_info().get("max_recommended_working_set_size"):
        mx.set_wired_limit(min(int(most), limit))


def arithmetic() -> dict[str, str | None]:
    """All that decides the bits of a result beside model and engine, for cache keys.

    These are MLX's version, the device and a preloaded BLAS with its kernels. On a Mac,
    Metal's kernels come with the system and newer GPUs have others for float32. So system,
    architecture and TF32 count too.
    """
    info = mx.device_info()
    facts = {
        "MLX": _MLX, "device": str(info.get("device_name")),
        "backend": str(current_device()), "BLAS": loaded_blas(),
        "build of the BLAS": blas_build(),
    }  # fmt: skip
    if _MACOS:
        tf32 = os.environ.get("MLX_ENABLE_TF32")
        facts |= {"macOS": _MACOS, "architecture": str(info.get("architecture")), "TF32": tf32}
    return facts


def device_name() -> str:
    """The device that MLX computes on: `gpu, Apple M2`, or `cpu`."""
    return "cpu" if on_cpu() else f"gpu, {mx.device_info()['device_name']}"


def machine() -> dict[str, Any]:
    """Describe device, backend, memory (bytes) and BLAS; keys without a value are left out."""
    info = mx.device_info()
    backend = "cpu" if on_cpu() else "metal" if mx.metal.is_available() else "gpu"
    facts = {
        "system": platform.platform(),
        "device": info.get("device_name", "unknown"),
        "backend": backend,
        "cores": os.cpu_count(),
        "memory": info.get("memory_size", _system_memory()),
        "working_set": info.get("max_recommended_working_set_size"),
        "blas": loaded_blas(),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_peak() -> int:
    """Most bytes of memory that this process has held so far, all that is not MLX's included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def outside_mlx() -> int:
    """Bytes of memory that this process holds now beside MLX's, Python and NumPy.

    In whole steps of 256 MiB, so that the same command plans the same batches each time.
    """
    if sys.platform == "darwin":  # which has no /proc
        argv = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        held = 1024 * int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    else:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held = pages * os.sysconf("SC_PAGE_SIZE")
    rest = held - mx.get_active_memory() - mx.get_cache_memory()
    return max(0, -(-rest // _STEP)) * _STEP


def give_back_memory() -> None:
    """Return to the system what MLX and the C library keep of freed memory.

    MLX keeps it up to its cache limit. glibc keeps blocks of less than 32 MB, which are arrays of
    one module: 15 to 50 MB more with every merge of a 1B model.
    """
    mx.clear_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def versions() -> dict[str, str]:
    """The installed versions of the packages that results depend on."""
    return {package: version(package) for package in _PACKAGES}


def environment() -> dict[str, Any]:
    """Describe machine, Python and packages, which results depend on beside their inputs."""
    return {"machine": machine(), "python": platform.python_version(), "versions": versions()}
