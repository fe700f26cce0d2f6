"""d2c-mlx: merge and compress many LoRA adapters to fit a storage budget, on MLX.

`pipeline.py` is the whole program on one page; start reading there. What a program may import is in
`_NAMES`, each name from its own module when it is asked for: mlx_lm alone takes a second.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from d2c_mlx.utils.environment import VERSION as __version__
from d2c_mlx.utils.environment import preload_blas, share_one_heap

# Before there are threads, and before anything imports mlx.core: see utils/environment.py.
share_one_heap()
preload_blas()
# On the GPUs that have it (M5, NVIDIA) MLX would round float32 products to 10 bits by default; what
# is said to be in float32 here is meant to be.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

if TYPE_CHECKING:
    from d2c_mlx.adapters.adapter import Adapter as Adapter
    from d2c_mlx.adapters.adapter import LoRA as LoRA
    from d2c_mlx.adapters.peft_format import save_peft as save_peft
    from d2c_mlx.adapters.reading import read_adapter as read_adapter
    from d2c_mlx.compare import compare_runs as compare_runs
    from d2c_mlx.merge.methods import merge_adapters as merge_adapters
    from d2c_mlx.packs.export import export as export
    from d2c_mlx.packs.export import verify as verify
    from d2c_mlx.packs.pack import Pack as Pack
    from d2c_mlx.packs.pack import load_pack as load_pack
    from d2c_mlx.phone.benchmark import bench_phone as bench_phone
    from d2c_mlx.phone.config import PhoneConfig as PhoneConfig
    from d2c_mlx.pipeline import run as run_pipeline  # noqa: F401
    from d2c_mlx.run.config import RunConfig as RunConfig
    from d2c_mlx.serve.load import load as load
    from d2c_mlx.utils.errors import D2CError as D2CError
    from d2c_mlx.utils.errors import InputError as InputError

# Public name -> where it is, and its name there. `run` alone would be the wing of that name.
_NAMES = {
    "Adapter": ("adapters.adapter", "Adapter"),
    "D2CError": ("utils.errors", "D2CError"),
    "InputError": ("utils.errors", "InputError"),
    "LoRA": ("adapters.adapter", "LoRA"),
    "Pack": ("packs.pack", "Pack"),
    "PhoneConfig": ("phone.config", "PhoneConfig"),
    "RunConfig": ("run.config", "RunConfig"),
    "bench_phone": ("phone.benchmark", "bench_phone"),
    "export": ("packs.export", "export"),
    "compare_runs": ("compare", "compare_runs"),
    "load": ("serve.load", "load"),
    "load_pack": ("packs.pack", "load_pack"),
    "merge_adapters": ("merge.methods", "merge_adapters"),
    "read_adapter": ("adapters.reading", "read_adapter"),
    "run_pipeline": ("pipeline", "run"),
    "save_peft": ("adapters.peft_format", "save_peft"),
    "verify": ("packs.export", "verify"),
}
__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> object:
    """Import a public name from its module, once."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, inner = _NAMES[name]
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), inner)
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
