"""Reading one adapter in whichever format its files are: PEFT, MLX or GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import WEIGHTS, Adapter
from d2c_mlx.adapters.checks import check_adapter, check_base
from d2c_mlx.adapters.gguf_format import read_gguf_lora
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, PICKLE, load_peft
from d2c_mlx.utils.errors import AdapterError

__all__ = ["read_adapter"]


def read_adapter(
    path: str | Path,
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Read a PEFT, MLX or GGUF adapter, recognised by its files, and check it against the base.

    `sources.read_adapters` reads all adapters that an option names.

    Args:
        path: the directory of one adapter, or a `.gguf`.
        shapes: module path -> (in, out) of the base model's linear modules.
        config: the base model's config.json. A GGUF needs it, as its rows are ordered by heads; and
            without it a base whose weights mlx-lm changes is not refused.

    Raises:
        AdapterError: it cannot be read, or not be converted exactly; every reason is listed.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        check_base(path, config)
        return read_gguf_lora(path, shapes, config)
    found = [file for file in (PEFT_WEIGHTS, WEIGHTS) if (path / file).exists()]
    if len(found) > 1:
        raise AdapterError(f"{path}: holds {' and '.join(found)}; keep one of them")
    gguf = sorted(path.glob("*.[gG][gG][uU][fF]"))
    if not found and len(gguf) == 1:
        check_base(gguf[0], config)
        return replace(read_gguf_lora(gguf[0], shapes, config), name=path.name)
    if not found and (path / PICKLE).exists():
        raise AdapterError(
            f"{path / PICKLE}: a pickle can run code and is never loaded; save it again with PEFT's"
            " save_pretrained(..., safe_serialization=True)"
        )
    if not found:
        raise AdapterError(
            f"{path}: no adapter weights; expected {PEFT_WEIGHTS} (PEFT), {WEIGHTS} (MLX) or one"
            " .gguf"
        )
    if found == [PEFT_WEIGHTS]:
        check_base(path / PEFT_WEIGHTS, config)
    adapter = load_peft(path) if found == [PEFT_WEIGHTS] else load_adapter(path)
    check_adapter(adapter, shapes, path / found[0])
    return adapter
