"""The environment of the process: BLAS and its threads, heap, cache directory, ranks.

The Linux wheel of MLX links a reference BLAS (about 6 GFLOP/s in float32). Loading OpenBLAS (or
MKL) with global symbols before `mlx.core` makes the same wheel 15 to 30 times faster. Importing
`d2c_mlx` does it; `D2C_MLX_BLAS=off` prevents it and `D2C_MLX_BLAS=/path/lib.so` chooses one.
"""

import ctypes
import glob
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The installed version of this package.
VERSION = version("d2c-mlx")
# Every rank has one of these in its environment: mlx.launch (ring, JACCL), Open MPI, MPICH.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
# The number of glibc's option for the most heaps, from malloc.h.
_ARENA_MAX = -8
_BLAS = (
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
    return next((hit for pattern in _BLAS for hit in sorted(glob.glob(pattern))), None)


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
    limit_blas_threads(min(cores, max(1, int(wish))) if wish.isdecimal() else cores)
    try:
        yield
    finally:
        limit_blas_threads(before)


def share_one_heap() -> None:
    """Let all threads take memory from one heap of glibc; call it before there are any.

    glibc gives threads heaps of their own. Each keeps up to 64 MB of freed memory at its end, which
    `malloc_trim` does not return, and MLX and thread pools make a dozen. `MALLOC_ARENA_MAX` in the
    environment goes first.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change and "MALLOC_ARENA_MAX" not in os.environ:
        change(_ARENA_MAX, 1)


def cache_directory() -> Path:
    """The directory of converted models and losses: `$D2C_MLX_CACHE`, or `~/.cache/d2c-mlx`."""
    given = os.environ.get("D2C_MLX_CACHE")
    return Path(os.path.expanduser(given) if given else Path.home() / ".cache/d2c-mlx")


def program() -> str:
    """This command as a shell finds it: by its name, or by its path where it is on none."""
    named = os.path.basename(sys.argv[0]) != "d2c-mlx" or shutil.which("d2c-mlx")
    path = min(sys.argv[0], os.path.relpath(sys.argv[0]), key=len)
    return "d2c-mlx" if named else shlex.quote(path)


def local_ranks() -> int:
    """Number of ranks of an `mlx.launch` on this machine, which share its cores and memory."""
    path, rank = os.environ.get("MLX_HOSTFILE", ""), int(os.environ.get("MLX_RANK", 0))
    try:
        hosts = [addresses[0].rsplit(":", 1)[0] for addresses in json.loads(Path(path).read_text())]
        return max(1, hosts.count(hosts[rank]))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return 1  # not the ring backend
