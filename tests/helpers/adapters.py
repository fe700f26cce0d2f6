"""Random adapters of the tiny model, what packs of them say, and what a compact one holds."""

import mlx.core as mx
import numpy as np

from d2c_mlx import Adapter
from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.model import Model
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from helpers.loras import lora_of
from helpers.tiny import ALL, LAYERS

Q, V, UP = "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"
ABOUT = {"model": "m", "config_hash": "", "n_layers": LAYERS, "budget": "-", "max_bytes": None}
SERVES = {"one": 0, "also": 0, "two": 1, "none": None, "lost": 2}
COMPACT_ABOUT = ABOUT | {"model": "tiny/llama", "config_hash": "0" * 64, "budget": "9KB"}
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


def compressed(adapters, bits=4):
    """Two adapters, the second of mixed levels, and one that has lost all its modules."""
    one, two = adapters
    mixed = [(1, 16), (2, bits)] if bits < 16 else [(3, 16)]
    return [
        compress(one, dict.fromkeys(one.modules, [(4, bits)])),
        compress(two, {path: mixed if "q_proj" in path else [(2, bits)] for path in two.modules}),
        compress(one, dict.fromkeys(one.modules, ())),
    ]


def pack_of(base, adapters, directory, serves=None, **about):
    """A pack of this base model."""
    about = ABOUT | {"model": base.name, "config_hash": base.config_hash} | about
    return write_pack(directory, adapters, Manifest(**about), serves)


def small_pack(paths, directory):
    """A pack that stores a and b in low-bit factors, and leaves c to the base model."""
    base = Model(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "ab"]
    small = [compress(adapter, dict.fromkeys(adapter.modules, [(4, 4)])) for adapter in adapters]
    return pack_of(base, small, directory, {"a": 0, "b": 1, "c": None})
