"""Environment variables that decide where files are and which rank this process is."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["RANK_VARIABLES", "cache_directory"]

# One of them is in the environment of every rank: mlx.launch (ring, JACCL), Open MPI, MPICH.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def cache_directory() -> Path:
    """Where converted base models are kept: `$D2C_MLX_CACHE`, or `~/.cache/d2c-mlx`."""
    given = os.environ.get("D2C_MLX_CACHE")
    return Path(os.path.expanduser(given) if given is not None else Path.home() / ".cache/d2c-mlx")
