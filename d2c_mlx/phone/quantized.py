"""A base model quantized by mlx-lm, once, into the cache."""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import version
from pathlib import Path

from mlx_lm.utils import load_config, quantize_model, save

from d2c_mlx.models.resolve import cached_model, resolve_model, weights_digest
from d2c_mlx.models.stock import linear_shapes, load_stock
from d2c_mlx.utils.errors import ModelError
from d2c_mlx.utils.files import hash_file
from d2c_mlx.utils.parsing import json_or_none

# Files beside the weights that are copied with them or decide how they are read: config, tokenizer
# in any of its forms, chat template. They are small enough to be hashed.
_SIDE_FILES = {".json", ".jinja", ".model", ".txt", ".tiktoken"}


def quantized_model(spec: str | None, bits: int | None) -> tuple[str, Path]:
    """Find a base model, quantized as asked.

    A model that is not quantized yet is quantized by mlx-lm's `quantize_model`, once, into the
    cache.

    Args:
        spec: see `models.resolve.resolve_model`.
        bits: 4 or 8; None takes the model as it is.

    Returns:
        Its name, and the mlx-lm directory of the quantized model.

    Raises:
        ModelError: no such model, or it has other bits already.
    """
    name, path = resolve_model(spec)
    config = json_or_none(path / "config.json")
    about = config if isinstance(config, dict) else {}  # mlx-lm says what is wrong with it.
    quantization = about.get("quantization", about.get("quantization_config"))
    stored = quantization.get("bits", "unknown") if isinstance(quantization, dict) else None
    if bits in (None, stored):
        return name, path
    if stored:
        raise ModelError(
            f"{path}: its weights have {stored} bits already, expected weights that are not"
            f" quantized for --bits {bits}; leave --bits out"
        )
    beside = [
        (file.name, hash_file(file))
        for file in sorted(path.iterdir())
        if file.suffix in _SIDE_FILES and file.is_file()
    ]
    parts = [weights_digest(path), beside, bits, version("mlx-lm"), "v3"]

    def write(directory: Path) -> None:
        model, tokenizer = load_stock(path, lazy=True)
        shapes = linear_shapes(model.named_modules()).values()
        # Of a width that no group divides mlx-lm leaves the weights as they are.
        size = 64 if all(width % 64 == 0 for width, _ in shapes) else 32
        with contextlib.redirect_stdout(sys.stderr):
            model, config = quantize_model(model, load_config(path), size, bits)
            save(directory, path, model, tokenizer, config)

    return name, cached_model(f"{path.name}-{bits}bit", parts, write)
