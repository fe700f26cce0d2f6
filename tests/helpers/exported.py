"""Adapters whose factors are exported."""

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from helpers.loras import lora_of
from helpers.tiny import ALL

DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def adapter_of(name, paths=ALL, dtype=mx.float16, mixed=False, seed=0):
    rng = np.random.default_rng(seed)
    modules = {
        path: lora_of(rng, ALL[path], 1 + i % 4 if mixed else 3, 0.5 + i % 3 if mixed else 1.25,
                      dtype, 0.3)
        for i, path in enumerate(paths)
    }  # fmt: skip
    return Adapter(name, modules, "tiny/llama", (name,))
