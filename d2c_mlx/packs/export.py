"""A pack for other programs: mlx-lm and mlx-swift, PEFT, llama.cpp."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.gguf_format import ARCHITECTURES, save_gguf_lora
from d2c_mlx.adapters.peft_format import save_peft
from d2c_mlx.models.resolve import resolve_exact_base
from d2c_mlx.packs.pack import Pack
from d2c_mlx.packs.unpack import unpack, write_adapters
from d2c_mlx.run.overwrite import check_output, local_model
from d2c_mlx.utils.errors import ConfigError, ModelError, PackError

__all__ = ["FORMATS", "export"]

FORMATS = ("mlx", "peft", "gguf")


def export(pack: Pack, to: str, directory: Path, model: str | None = None) -> dict[str, str | None]:
    """Write every adapter of a pack in another format, and `tasks.json`.

    Args:
        pack: what `load_pack` verified.
        to: `mlx` (what `unpack` writes), `peft` (a directory each) or `gguf` (a file each).
        directory: replaced as a whole.
        model: the pack's base model, as for `resolve_model`. Only gguf needs it, for its
            architecture and heads; None is enough where the base is the embedded default.

    Returns:
        What `tasks.json` holds: task -> file or directory, null for the base model.

    Raises:
        InputError: an unknown format, an architecture that is not known in GGUF, another base
            model, or what `write_adapters` raises; nothing is written.
    """
    check_output(directory, [("pack", pack.path), *local_model(model)], error=PackError)
    if to == "mlx":
        return unpack(pack, directory)
    if to == "peft":
        config = _base_config(pack, model)[1] if model else None
        return write_adapters(pack, directory, partial(save_peft, config=config))
    if to != "gguf":
        raise ConfigError(f"to: {to!r}, expected one of {', '.join(FORMATS)}")
    write = partial(save_gguf_lora, config=_gguf_config(pack, model))
    return write_adapters(pack, directory, write, ".gguf")


def _base_config(pack: Pack, model: str | None) -> tuple[Path, dict[str, Any]]:
    """The config.json of the model that the pack was made for: where, and what it says."""
    path = resolve_exact_base(pack.manifest["base"], model) / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return path, config


def _gguf_config(pack: Pack, model: str | None) -> dict[str, Any]:
    """That of an architecture whose tensors in GGUF are known."""
    path, config = _base_config(pack, model)
    if config.get("model_type") not in ARCHITECTURES:
        raise ModelError(
            f"{path}: model_type is {config.get('model_type')!r}, whose names and rows in GGUF are"
            f" not known here; expected one of {', '.join(ARCHITECTURES)}"
        )
    return config
