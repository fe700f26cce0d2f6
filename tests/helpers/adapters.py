"""Adapters of the tiny model with other ranks, scales and modules, and what packs of them say."""

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from helpers.loras import lora_of
from helpers.tiny import LAYERS, SHAPES

Q, V, UP = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"
ABOUT = {"model": "m", "config_hash": "", "n_layers": LAYERS, "budget": "-", "max_bytes": None}


def adapter_of(name, modules, rank, scale, seed):
    rng = np.random.default_rng(seed)
    loras = {
        f"model.layers.{i}.{module}": lora_of(rng, SHAPES[module], rank, scale, mx.float16, 0.2)
        for i, module in modules
    }
    return Adapter(name, loras, "m", (name,))


ADAPTERS = [
    adapter_of("wide", [(i, m) for i in range(LAYERS) for m in SHAPES], 3, 1.5, 0),
    adapter_of("late", [(1, UP)], 2, 4.0, 1),
    adapter_of("other", [(0, Q), (1, Q), (1, V)], 5, 0.7, 2),
]
