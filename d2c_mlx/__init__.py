"""d2c-mlx: merge many LoRA adapters into the few that fit, on MLX.

`pipeline.run(config)` is the whole program on one page; start reading there.
"""

import os
from typing import TYPE_CHECKING

from d2c_mlx.utils.blas import preload_blas

if TYPE_CHECKING:
    from d2c_mlx.serve.load import load

# Before anything imports mlx.core: see blas.py.
preload_blas()
# On the GPUs that have it (M5, NVIDIA) MLX would round float32 products to 10 bits by default; what
# is said to be in float32 here is meant to be.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """Import `load` when it is asked for: mlx_lm takes a second."""
    if name == "load":
        from d2c_mlx.serve.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
