"""A pack for the benchmark of phones."""

from d2c_mlx.adapters.reading import read_adapter
from d2c_mlx.compress.quantize import compress
from d2c_mlx.models.model import Model
from d2c_mlx.packs.manifest import Manifest
from d2c_mlx.packs.write import write_pack
from helpers.tiny import LAYERS


def make_pack(paths, directory):
    """Of a and b, both stored in low-bit factors; c is left to the base model."""
    base = Model(str(paths.model))
    adapters = [read_adapter(paths.adapters / name, base.module_shapes) for name in "ab"]
    small = [compress(adapter, dict.fromkeys(adapter.modules, [(4, 4)])) for adapter in adapters]
    serves = {"a": 0, "b": 1, "c": None}
    about = {"model": base.name, "config_hash": base.config_hash, "n_layers": LAYERS}
    return write_pack(directory, small, Manifest(**about, budget="-"), serves)
