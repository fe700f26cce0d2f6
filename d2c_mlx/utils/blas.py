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
_library: ctypes.CDLL | None = None


def find_blas() -> str | None:
    """Find the fast BLAS that `preload_blas` would load; None if there is none or it is off."""
    wish = os.environ.get("D2C_MLX_BLAS", "")
    if sys.platform != "linux" or wish == "off":
        return None
    if wish:
        return wish
    return next((hit for pattern in _PATTERNS for hit in sorted(glob.glob(pattern))), None)


def preload_blas() -> str | None:
    """Load the fast BLAS, unless MLX is already imported and it would have no effect.

    Returns:
        Path of the BLAS that is loaded; None if there is none.
    """
    global _loaded, _library
    path = find_blas()
    if path and _loaded is None and "mlx.core" not in sys.modules:
        try:
            _library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError:
            return None
        _loaded = path
    return _loaded


def loaded_blas() -> str | None:
    """Path of the BLAS that `preload_blas` loaded; None if it loaded none."""
    return _loaded


def blas_build() -> str | None:
    """Version and kernels of the preloaded OpenBLAS, in its own words; None if there is none."""
    tell = getattr(_library, "openblas_get_config", None)
    if tell is None:
        return None
    tell.restype = ctypes.c_char_p
    return tell().decode()


def limit_blas_threads(n_threads: int) -> bool:
    """Limit the preloaded OpenBLAS to `n_threads` per call; False if there is none."""
    setter = getattr(_library, "openblas_set_num_threads", None)
    if setter is None:
        return False
    setter(n_threads)
    return True


@contextmanager
def all_cores() -> Iterator[None]:
    """Let the preloaded OpenBLAS use all cores of this process inside the block.

    `OPENBLAS_NUM_THREADS` stays its limit: beside other work, threads that wait cost more than one.
    """
    getter = getattr(_library, "openblas_get_num_threads", None)
    if getter is None:
        yield
        return
    before = getter()
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
