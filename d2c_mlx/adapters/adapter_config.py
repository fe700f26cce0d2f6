"""`adapter_config.json`, which PEFT and mlx-lm both write beside an adapter's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from d2c_mlx.adapters.adapter import CONFIG
from d2c_mlx.utils.errors import AdapterError
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json

__all__ = ["base_key", "base_name", "read_config", "stated_base"]

# How names of models end that hold another's weights in another precision or file.
_PRECISION = re.compile(
    r"[-_.](unsloth|bnb|mlx|gguf|gptq|awq|dwq|\d-?bits?|int[48]|fp8|b?fp?16|fp32|float(16|32)|"
    r"i?q\d(_\w+)?)$"
)


def read_config(directory: Path) -> dict[str, object]:
    """Read an adapter's `adapter_config.json`.

    Raises:
        AdapterError: it is missing, or no JSON object.
    """
    path = directory / CONFIG
    try:
        config = parse_json(read_text(path))
    except FileNotFoundError:
        raise AdapterError(f"{path}: missing; an adapter needs its adapter_config.json") from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def stated_base(config: Mapping[str, object]) -> str:
    """The base model as a config states it, a path whole; empty if it states none."""
    return str(config.get("base_model_name_or_path") or config.get("model") or "")


def base_name(config: Mapping[str, object]) -> str | None:
    """The base model's name as a config states it; None if it states none.

    Only the last part is kept of a path: the rest tells who trained the adapter, and a pack would
    carry it on.

    Args:
        config: an `adapter_config.json`, of PEFT or mlx-lm.
    """
    name = stated_base(config)
    # A path and no hub id: absolute, in a home directory, ./ or ../, an address, or of Windows.
    if name.startswith(("/", "~", ".")) or {":", "\\"} & set(name):
        parts = [part for part in re.split(r"[/\\:]", name) if part.strip(".")]
        name = parts[-1] if parts and parts[-1][0] != "~" else ""
    return name or None


def base_key(name: str | None) -> str | None:
    """What a base model is: its name without owner and precision, small letters; None as given.

    `unsloth/Llama-3.2-1B-bnb-4bit` and `mlx-community/Llama-3.2-1B-4bit` are one.
    """
    key = name and name.rpartition("/")[2].lower()
    while key and (shorter := _PRECISION.sub("", key)) not in ("", key):
        key = shorter
    return key
