"""Reading adapters in whichever format their files are: PEFT, MLX, GGUF or AdapterBias."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import CONFIG, WEIGHTS, Adapter
from d2c_mlx.adapters.adapter_bias import ADAPTER_BIAS, load_adapter_bias
from d2c_mlx.adapters.adapter_config import read_config, stated_base
from d2c_mlx.adapters.checks import check_adapter, check_base
from d2c_mlx.adapters.gguf_format import read_gguf_lora
from d2c_mlx.adapters.mlx_format import MLX_LAYOUT, load_adapter
from d2c_mlx.adapters.peft_format import PEFT_LAYOUT, PEFT_WEIGHTS, PICKLE, load_peft
from d2c_mlx.adapters.sources import Source
from d2c_mlx.adapters.tensor_file import in_file
from d2c_mlx.utils.errors import AdapterError, InputWarning, gather

__all__ = ["left_in_file", "read_adapter", "read_adapters"]

_LOADERS = {PEFT_WEIGHTS: load_peft, WEIGHTS: load_adapter, ADAPTER_BIAS: load_adapter_bias}


def read_adapter(
    path: str | Path,
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any] | None = None,
) -> Adapter:
    """Read an adapter, its format recognised by its files, and check it against the base.

    `read_adapters` reads all adapters that an option names.

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
    found = [file for file in _LOADERS if (path / file).exists()]
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
            f"{path}: no adapter weights; expected {PEFT_WEIGHTS} (PEFT), {WEIGHTS} (MLX),"
            f" {ADAPTER_BIAS} or one .gguf"
        )
    if found == [PEFT_WEIGHTS]:
        check_base(path / PEFT_WEIGHTS, config)
    adapter = _LOADERS[found[0]](path)
    check_adapter(adapter, shapes, path / found[0])
    return adapter


def read_adapters(
    sources: Sequence[Source],
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    is_base: Callable[[Path], bool] = lambda _: False,
) -> list[Adapter]:
    """Read every adapter and check it against the base model; one at a time is in memory.

    What is returned is `left_in_file`. Adapters whose configs name different base models get an
    `InputWarning`.

    Args:
        sources: what `find_adapters` found.
        shapes: module path -> (in, out) of the base model's linear modules.
        config: the base model's config.json, see `read_adapter`.
        is_base: True for a directory with a copy of the base model.

    Raises:
        InputError: the problems of all adapters, one line each.
    """

    def read(source: Source) -> Adapter:
        adapter = read_adapter(source.path, shapes, config)
        adapter = left_in_file(adapter, source.path)
        return replace(adapter, name=source.name, origin=source.origin)

    found = gather(partial(read, source) for source in sources)
    _warn_of_bases(found, sources, is_base)
    return found


def left_in_file(adapter: Adapter, path: Path) -> Adapter:
    """The same adapter with its numbers in the files that it was read from, not in memory.

    Args:
        adapter: what `read_adapter` read from `path`.
        path: its directory; an adapter in a GGUF stays in memory.
    """
    for file, layout in ((path / WEIGHTS, MLX_LAYOUT), (path / PEFT_WEIGHTS, PEFT_LAYOUT)):
        if file.is_file():
            return in_file(adapter, file, layout)
    return adapter


def _warn_of_bases(
    adapters: Sequence[Adapter], sources: Sequence[Source], is_base: Callable[[Path], bool]
) -> None:
    """Warn if configs name several bases: shapes do not tell a base model from its fine-tunes."""
    named: dict[str, list[str]] = {}
    for adapter in adapters:
        if adapter.base:
            named.setdefault(adapter.base, []).append(adapter.name)
    if len(named) > 1:
        # A path says more than a name: mlx-lm trains on a local copy in float32, say.
        known = {
            one.name for one in sources
            if (one.path / CONFIG).is_file() and is_base(Path(stated_base(read_config(one.path))))
        }  # fmt: skip
        named = {base: of for base, of in named.items() if not set(of) <= known}
    if len(named) > 1:
        listed = ", ".join(f"{base!r} ({len(of)}: {_few(of)})" for base, of in named.items())
        # A local path and an id may be the same model, so it is no error.
        warnings.warn(
            f"adapters: found {len(named)} names of base models, expected one: {listed}; unless all"
            " are the same model, leave out what was trained on another",
            InputWarning,
            stacklevel=3,
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names)
