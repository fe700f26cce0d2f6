"""Four adapters, and what is known of a pack of them."""

from d2c_mlx.adapters.reading import read_adapter
from helpers.tiny import ALL, LAYERS, peft_adapter

NAMES = ("a", "b", "c", "d")
ABOUT = {"model": "tiny/llama", "config_hash": "0" * 64, "n_layers": LAYERS}


def full_rank(root):
    paths = {name: peft_adapter(root, name, seed=seed) for seed, name in enumerate(NAMES)}
    return {name: read_adapter(path, ALL) for name, path in paths.items()}


def deltas(adapter):
    return {path: lora.delta() for path, lora in adapter.modules.items()}
