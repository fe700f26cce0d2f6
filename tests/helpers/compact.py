"""What a compact pack of two adapters holds, and what it says."""

from d2c_mlx.compress.quantize import compress
from helpers.tiny import LAYERS

SERVES = {"one": 0, "also": 0, "two": 1, "none": None, "lost": 2}
ABOUT = {"model": "tiny/llama", "config_hash": "0" * 64, "n_layers": LAYERS, "budget": "9KB"}


def compressed(adapters, bits=4):
    """Two adapters, the second of mixed levels, and one that has lost all its modules."""
    one, two = adapters
    mixed = [(1, 16), (2, bits)] if bits < 16 else [(3, 16)]
    return [
        compress(one, dict.fromkeys(one.modules, [(4, bits)])),
        compress(two, {path: mixed if "q_proj" in path else [(2, bits)] for path in two.modules}),
        compress(one, dict.fromkeys(one.modules, ())),
    ]
