"""Reading adapters: `read_adapter` is the one place where formats part.

A format has a file name in `weights_file` and a function that makes an `Adapter` of that file, in a
module of its own: PEFT, MLX and GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import WEIGHTS, Adapter
from d2c_mlx.adapters.checks import DoraBase, base_key, check_adapter, check_base
from d2c_mlx.adapters.gguf_format import read_gguf
from d2c_mlx.adapters.mlx_format import read_mlx
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, PICKLE, read_peft
from d2c_mlx.adapters.sources import Source
from d2c_mlx.adapters.tensor_file import MLX_NAMES, PEFT_NAMES, in_file
from d2c_mlx.utils.errors import AdapterError, gather, warn

__all__ = ["left_in_file", "read_adapter", "read_adapters", "weights_file"]

# Files of weights that are not read, and what to do.
_OTHER_FILES = {
    PICKLE: "a pickle can run code and is never loaded; save it again with PEFT's"
    " save_pretrained(..., safe_serialization=True)",
    "adapter_model.pt": "a pickle in torchtune's own names is never loaded; its Hugging Face"
    " checkpointer writes adapter_model.safetensors beside it, but not for Phi-3 and vision models",
    "adapters.npz": "has no scale; train it again, or save it as adapters.safetensors with the"
    " adapter_config.json of mlx-lm",
    "adapter_bias.safetensors": "an AdapterBias is not read; save it as a LoRA of rank 1 on"
    " down_proj, with a its scorer and b its vector",
}


def read_adapter(
    path: str | Path,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    config: Mapping[str, Any] | None = None,
    dora: DoraBase | None = None,
) -> Adapter:
    """Read an adapter, its format recognised by its files, and check it against the base.

    `read_adapters` reads all adapters that an option names.

    Args:
        path: the directory of one adapter, or a `.gguf`.
        shapes: module path -> (in, out) of the base model's linear modules. None compares nothing
            with a base, as for files that we wrote; a GGUF then cannot be read.
        config: the base model's config.json. A GGUF needs it, as its rows are ordered by heads; and
            without it a base whose weights mlx-lm changes is not refused.
        dora: makes DoRAs LoRAs; without it they are refused.

    Raises:
        AdapterError: it cannot be read, or not be converted exactly; every reason is listed.
    """
    path = Path(path)
    file = weights_file(path)
    if file.name == WEIGHTS:
        adapter = read_mlx(path, dora)
    else:
        check_base(file, config)
        if file.name == PEFT_WEIGHTS:
            adapter = read_peft(path, dora, shapes or ())
        else:
            adapter = read_gguf(file, shapes or (), config)
            adapter = adapter if file == path else replace(adapter, name=path.name)
    if shapes is not None:
        check_adapter(adapter, shapes, file)
    return adapter


def weights_file(path: Path) -> Path:
    """The file that has the weights of an adapter: PEFT's, MLX's, or a `.gguf`.

    Args:
        path: the directory of one adapter, or a `.gguf`.

    Raises:
        AdapterError: there is none that is read, or more than one.
    """
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    files = [path / name for name in (PEFT_WEIGHTS, WEIGHTS) if (path / name).exists()]
    files = files or sorted(path.glob("*.[gG][gG][uU][fF]"))
    if len(files) > 1:
        names = " and ".join(file.name for file in files)
        raise AdapterError(f"{path}: holds {names}; keep one of them")
    if files:
        return files[0]
    for name, why in _OTHER_FILES.items():
        if (path / name).exists():
            raise AdapterError(f"{path / name}: {why}")
    raise AdapterError(
        f"{path}: no adapter weights; expected {PEFT_WEIGHTS} (PEFT), {WEIGHTS} (MLX) or one .gguf"
    )


def read_adapters(
    sources: Sequence[Source],
    shapes: Mapping[str, tuple[int, int]],
    config: Mapping[str, Any],
    dora: DoraBase | None = None,
    expected: Sequence[str] = (),
) -> list[Adapter]:
    """Read every adapter and check it against the base model; one at a time is in memory.

    What is returned is `left_in_file`. Adapters whose configs name different base models, or others
    than are expected, get an `InputWarning`.

    Args:
        sources: what `find_adapters` found.
        shapes: module path -> (in, out) of the base model's linear modules.
        config: the base model's config.json, see `read_adapter`.
        dora: makes DoRAs LoRAs; without it they are refused.
        expected: names of the base model, as a pack has them.

    Raises:
        InputError: the problems of all adapters, one line each.
    """

    def read(source: Source) -> Adapter:
        adapter = left_in_file(read_adapter(source.path, shapes, config, dora), source.path)
        return replace(adapter, name=source.name, origin=source.origin)

    adapters = gather(partial(read, source) for source in sources)
    # Shapes do not tell a base model from its fine-tunes; two names may be one model.
    groups: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        if adapter.base:
            groups.setdefault(base_key(adapter.base), []).append(adapter)
    others = groups.keys() - set(map(base_key, expected))
    if len(others) > (not expected):
        names = (f"{group[0].base!r} ({', '.join([adapter.name for adapter in group[:20]])}"
                 f"{', ...' if len(group) > 20 else ''})" for group in groups.values())  # fmt: skip
        warn(
            f"adapters: found base models {', '.join(names)}, expected"
            f" {' or '.join(map(repr, expected)) or 'one'}; unless all are the same model, leave"
            " out what was trained on another"
        )
    return adapters


def left_in_file(adapter: Adapter, path: Path) -> Adapter:
    """The same adapter with its numbers in the files that it was read from, not in memory.

    Args:
        adapter: what `read_adapter` read from `path`.
        path: its directory; an adapter in a GGUF, made of a DoRA, or whose modules have other names
            there stays in memory.
    """
    if adapter.dora_error is not None:
        return adapter
    for file, names in ((path / WEIGHTS, MLX_NAMES), (path / PEFT_WEIGHTS, PEFT_NAMES)):
        if file.is_file():
            return in_file(adapter, file, names)
    return adapter
