"""A fast BLAS for MLX's CPU backend on Linux.

The Linux wheel of MLX links a reference BLAS (about 6 GFLOP/s in float32). Loading OpenBLAS (or
MKL) with global symbols before `mlx.core` makes the same wheel 15 to 30 times faster. Importing
`d2c_mlx` does it; `D2C_MLX_BLAS=off` prevents it and `D2C_MLX_BLAS=/path/lib.so` chooses one.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = [
    "all_cores",
    "blas_build",
    "find_blas",
    "limit_blas_threads",
    "loaded_blas",
    "preload_blas",
]

_PATTERNS = (
    "/usr/lib/*-linux-gnu/openblas-pthread/libblas.so.3",
    "/usr/lib64/libopenblasp.so*",
    "/usr/lib/libopenblas.so*",
    os.path.join(sys.prefix, "lib", "libmkl_rt.so*"),
)
_loaded: str | None = None


def find_blas() -> str | None:
    """Find the fast BLAS that `preload_blas` would load; None if there is none or it is off."""
    wish = os.environ.get("D2C_MLX_BLAS", "")
    if sys.platform != "linux" or wish == "off":
        return None
    if wish:
        return wish
    return next((hit for pattern in _PATTERNS for hit in sorted(glob.glob(pattern))), None)


def preload_blas() -> None:
    """Load the fast BLAS, unless MLX is already imported and it would have no effect."""
    global _loaded
    path = find_blas()
    if path and _loaded is None and "mlx.core" not in sys.modules:
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError:
            return
        _loaded = path


def loaded_blas() -> str | None:
    """Path of the BLAS that `preload_blas` loaded; None if it loaded none."""
    return _loaded


@cache
def _controller() -> Any:  # noqa: ANN401  threadpoolctl has no types
    """What controls the threads of the preloaded BLAS; None if there is none, or it has none."""
    from threadpoolctl import ThreadpoolController

    # Debian's libblas.so.3 loads the OpenBLAS beside it.
    folder = os.path.dirname(os.path.realpath(_loaded)) if _loaded else None
    libraries = ThreadpoolController().lib_controllers
    return next((lib for lib in libraries if os.path.dirname(lib.filepath) == folder), None)


def blas_build() -> str | None:
    """Version and kernels of the preloaded BLAS; None if there is none."""
    about = _controller().info() if _controller() else {}
    words = (about.get(key) for key in ("internal_api", "version", "architecture"))
    return " ".join(filter(None, words)) or None


def limit_blas_threads(n_threads: int) -> bool:
    """Limit the preloaded BLAS to `n_threads` per call; False if there is none."""
    if _controller():
        _controller().set_num_threads(n_threads)
    return _controller() is not None


@contextmanager
def all_cores() -> Iterator[None]:
    """Let the preloaded BLAS use all cores of this process inside the block.

    `OPENBLAS_NUM_THREADS` stays its limit: beside other work, threads that wait cost more than one.
    """
    if not _controller():
        yield
        return
    before = _controller().get_num_threads()
    cores = os.cpu_count() or 1
    if sys.platform == "linux":  # Only Linux tells which cores a process may use.
        cores = len(os.sched_getaffinity(0))
    wish = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if wish.isdecimal():
        cores = min(cores, max(1, int(wish)))
    limit_blas_threads(cores)
    try:
        yield
    finally:
        limit_blas_threads(before)
