"""Random adapters of the tiny model, and what packs of them say."""

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from helpers.loras import lora_of
from helpers.tiny import ALL, LAYERS

Q, V, UP = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"
ABOUT = {"model": "m", "config_hash": "", "n_layers": LAYERS, "budget": "-", "max_bytes": None}
DTYPES = (mx.float16, mx.bfloat16, mx.float32)


def adapter_of(name, paths=ALL, rank=3, scale=1.25, seed=0, dtype=mx.float16, mixed=False):
    """`mixed`: ranks and scales differ from module to module."""
    rng, modules = np.random.default_rng(seed), {}
    for i, path in enumerate(paths):
        own = (1 + i % 4, 0.5 + i % 3) if mixed else (rank, scale)
        modules[path] = lora_of(rng, ALL[path], *own, dtype, 0.3)
    return Adapter(name, modules, "tiny/llama", (name,))


# Of all modules, of a late block, and of some.
ADAPTERS = [
    adapter_of("wide", rank=3, scale=0.7),
    adapter_of("late", [f"model.layers.1.{UP}"], 2, 1.8, 1),
    adapter_of("other", [f"model.layers.{i}.{m}" for i, m in ((0, Q), (1, Q), (1, V))], 5, 0.3, 2),
]
