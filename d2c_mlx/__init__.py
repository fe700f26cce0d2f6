"""d2c-mlx: merge many LoRA adapters into the few that fit, on MLX.

`pipeline.run(config)` is the whole program on one page; start reading there.
"""

from d2c_mlx.blas import preload_blas

# Before anything imports mlx.core: see blas.py.
preload_blas()

__version__ = "0.1.0"
__all__ = ["__version__"]
