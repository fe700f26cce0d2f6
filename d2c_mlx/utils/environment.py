"""The environment of the process: cache directory, variables of ranks, packages, heap."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
from importlib.metadata import version
from pathlib import Path

from d2c_mlx.utils.errors import ConfigError

__all__ = [
    "EXTRAS",
    "RANK_VARIABLES",
    "VERSION",
    "cache_directory",
    "local_ranks",
    "require_extra",
    "share_one_heap",
]

# The installed version of this package.
VERSION = version("d2c-mlx")
# Every rank has one of these in its environment: mlx.launch (ring, JACCL), Open MPI, MPICH.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
# Extras of pyproject.toml that one command or option needs -> the modules that each brings.
EXTRAS = {"serve": ("prometheus_client", "starlette", "uvicorn", "llguidance")}
# The number of glibc's option for the most heaps, from malloc.h.
_ARENA_MAX = -8


def cache_directory() -> Path:
    """The directory of converted models and losses: `$D2C_MLX_CACHE`, or `~/.cache/d2c-mlx`."""
    given = os.environ.get("D2C_MLX_CACHE")
    return Path(os.path.expanduser(given) if given else Path.home() / ".cache/d2c-mlx")


def require_extra(extra: str, user: str) -> None:
    """Check that an optional package is installed; call it before any work that needs it later.

    Args:
        extra: a key of `EXTRAS`.
        user: option or command that needs it; the message begins with it.

    Raises:
        ConfigError: the package is missing; the message says what to install.
    """
    for module in EXTRAS[extra]:
        try:
            importlib.import_module(module)
        except ImportError:
            raise ConfigError(
                f"{user}: needs the package {module.replace('_', '-')}, which is not installed;"
                f' run pip install "d2c-mlx[{extra}]", in a clone ".[{extra}]"'
            ) from None


def share_one_heap() -> bool:
    """Let all threads take memory from one heap of glibc; call it before there are any.

    glibc gives threads heaps of their own. Each keeps up to 64 MB of freed memory at its end, which
    `malloc_trim` does not return, and MLX and thread pools make a dozen. `MALLOC_ARENA_MAX` in the
    environment goes first.

    Returns:
        True if it was done; False on other systems.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is None or "MALLOC_ARENA_MAX" in os.environ:
        return False
    return bool(change(_ARENA_MAX, 1))


def local_ranks() -> int:
    """Number of ranks of an `mlx.launch` on this machine, which share its cores and memory."""
    path, rank = os.environ.get("MLX_HOSTFILE", ""), int(os.environ.get("MLX_RANK", 0))
    try:
        hosts = [addresses[0].rsplit(":", 1)[0] for addresses in json.loads(Path(path).read_text())]
        return max(1, hosts.count(hosts[rank]))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return 1  # not the ring backend
