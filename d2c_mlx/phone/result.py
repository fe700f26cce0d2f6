"""The JSON result of the phone benchmark: its format, and reading it from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file

__all__ = ["FORMAT", "read_phone"]

Json = dict[str, Any]
FORMAT = "d2c-mlx-phone"
# Fields that a result must have, by where they are; * is any key or index.
_PARTS = {
    "model.": ("source_sha256", "bits", "name", "compute_dtype"),
    "pack.": ("manifest_sha256", "n_tasks"),
    "options.": ("contexts", "decode", "runs"),
    "": ("time", "quality"),
    "device.": ("name", "memory", "memory_source", "storage_source"),
    "methods.pack.storage.": ("nbytes", "limit", "margin", "fits"),
    "methods.*.": ("nbytes",),
    "methods.*.contexts.*.": ("context", "first_token_seconds", "prompt_tokens_per_second",
                              "decode_tokens_per_second"),
    "methods.*.memory.*.": ("context", "weights", "adapter", "kv_cache", "rest", "peak", "limit",
                            "margin", "fits"),
    "switch.": ("ratio", "ratio_before_token"),
    "switch.pack.": ("read_seconds", "attach_seconds", "token_seconds", "seconds"),
    "switch.stock.": ("reload_seconds", "token_seconds", "seconds"),
    "provenance.": ("includes", "versions"),
    "provenance.machine.": ("device", "system", "backend"),
}  # fmt: skip
_QUALITY = {
    "": ("n_rows", "float_dtype", "float_weights", "kept_gain"),
    "gain.": ("float", "device"),
    "float.*.": ("loss", "excess", "retention"),
    "device.*.": ("loss", "excess", "retention"),
    "device.pack.": ("loss",),
}


def read_phone(path: Path, of: Path | None = None) -> Json:
    """Read a result that `d2c-mlx phone --json` printed, or the last line of a history.

    Args:
        path: file of the result.
        of: directory of the pack that was measured; None takes the result of any pack.

    Raises:
        PackError: no such file, not a whole result, or one of another pack.
    """
    if not path.is_file():
        raise PackError(f"{path}: no such file; write one with d2c-mlx phone PACK --json > {path}")
    text = path.read_text(encoding="utf-8").strip()
    for candidate in (text, text.split("\n")[-1]):
        try:
            result = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(result, dict) and result.get("format") == FORMAT:
            break
    else:
        raise PackError(f"{path}: no result of d2c-mlx phone PACK --json, nor a history of them")
    if missing := _missing(result):
        more = f" and {len(missing) - 3} fields more" if len(missing) > 3 else ""
        raise PackError(
            f"{path}: has no {', '.join(missing[:3])}{more}, expected a whole result of d2c-mlx"
            " phone PACK --json; write it again"
        )
    if of and result["pack"]["manifest_sha256"] != hash_file(of / "manifest.json"):
        raise PackError(
            f"{path}: it is of another pack than {of}; measure this one with d2c-mlx phone {of}"
            f" --device {result['device']['name']} --json > {path}, or delete the file"
        )
    return result


def _missing(result: Json) -> list[str]:
    """Dotted names of all fields that a result lacks."""
    paths = [start + key for start, keys in _PARTS.items() for key in keys]
    if result.get("quality") is not None:
        paths += [f"quality.{start}{key}" for start, keys in _QUALITY.items() for key in keys]
    return list(dict.fromkeys(gap for path in paths for gap in _gaps(result, path)))


def _gaps(value: object, path: str) -> Iterator[str]:
    """Yield the dotted path up to the first missing key, for every branch that `path` names."""
    key, _, rest = path.partition(".")
    items = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(items, dict) or (key != "*" and key not in items) or not items:
        yield key
        return
    for name in items if key == "*" else [key]:
        yield from (f"{name}.{gap}" for gap in (_gaps(items[name], rest) if rest else ()))
