"""The adapters of a pack, written for other programs: mlx-lm and mlx-swift, PEFT, llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import check_base, read_config
from d2c_mlx.adapters.gguf_format import ARCHITECTURES, save_gguf, save_gguf_lora
from d2c_mlx.adapters.peft_format import save_peft
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.compress.gguf_form import gguf_of
from d2c_mlx.packs.manifest import PlainManifest
from d2c_mlx.packs.overwrite import check_output, local_model, mark
from d2c_mlx.packs.pack import Pack
from d2c_mlx.utils.errors import ConfigError, ModelError, PackError
from d2c_mlx.utils.files import read_text, write_dir, write_json

__all__ = ["FORMATS", "export", "n_layers", "unpacked_nbytes", "write_plain"]

FORMATS = ("mlx", "mlx-swift", "peft", "gguf")

# Gives the adapter of a task; writes it to a path that does not exist yet.
Load = Callable[[str], Any]
Write = Callable[[Any, Path], None]


def export(
    pack: Pack, to: str, directory: str | Path, model: str | None = None
) -> dict[str, str | None]:
    """Write every adapter of a pack in another format, and `tasks.json`.

    Args:
        pack: what `load_pack` verified.
        to: `mlx` (a directory `cluster-<k>` each, that mlx-lm and mlx-swift load), `mlx-swift`
            (the same, each module in its own rank), `peft` (a directory each) or `gguf` (a file
            `cluster-<k>.gguf` each).
        directory: replaced as a whole, only once everything is in it.
        model: the pack's base model, as for `resolve_model`; refused if it is another. Only gguf
            needs it, for its architecture and heads, unless the pack is of GGUF files; None is
            enough where the base is the embedded default.

    Returns:
        What `tasks.json` holds: task -> file or directory, null for the base model.

    Raises:
        InputError: an unknown format, an architecture that is not known in GGUF, another base
            model, a directory that must not be replaced (see `check_output`), or an adapter that
            cannot be read; nothing is written.
    """
    directory = Path(directory)
    inputs = [("pack", pack.path), *local_model(model)]
    check = partial(check_output, directory, inputs, error=PackError)
    check()
    if to not in FORMATS:
        raise ConfigError(f"to: {to!r}, expected one of {', '.join(FORMATS)}")
    base = None if model is None else pack.base_directory(model)
    load: Load = pack.load
    write: Write = partial(_write_mlx, pack)
    if to == "mlx-swift":
        write = partial(_write_swift, pack)
    if to == "peft":
        config = _config(base) if base else None
        check_base(pack.path, config, pack.manifest.base.model)
        write = partial(save_peft, config=config, n_layers=n_layers(pack))
    if to == "gguf" and pack.storage == "gguf":
        load, write = pack.tasks.get, pack.copy
    elif to == "gguf":
        config = _gguf_config(base or pack.base_directory(None))
        load, write = pack.stored, partial(_write_gguf, config=config)
    # Another command may have written there in the meantime.
    with write_dir(directory, lambda _: check()) as temporary, pack.reading():
        tasks = _write_adapters(pack, temporary, load, write, ".gguf" if to == "gguf" else "")
        mark(temporary, "export")
    return tasks


def write_plain(pack: Pack, directory: Path) -> None:
    """Write plain adapters into an empty directory, as `export` to `mlx` does, without a marker."""
    _write_adapters(pack, directory, pack.load, partial(_write_mlx, pack), "")


def n_layers(pack: Pack) -> int:
    """Blocks of the base model, which adapters in mlx-lm's layout state."""
    if not isinstance(pack.manifest, PlainManifest):
        return pack.manifest.base.n_layers
    first = next(iter(pack.adapters))
    found: Any = read_config(pack.path / str(first))["num_layers"]
    return int(found)


def unpacked_nbytes(pack: Pack) -> int:
    """Bytes of the plain adapters that `export` to `mlx` would write, as programs load them."""
    if isinstance(pack.manifest, PlainManifest):
        return pack.nbytes
    blocks = pack.manifest.base.n_layers
    found = (pack.load(served[0]) for served in pack.adapters.values())
    return sum(adapter.nbytes(blocks) for adapter in found if adapter)


def _write_adapters(
    pack: Pack, directory: Path, load: Load, write: Write, suffix: str
) -> dict[str, str | None]:
    tasks: dict[str, str | None] = {}
    for k, served in pack.adapters.items():
        adapter = load(served[0])
        name = None
        if adapter:
            name = (f"cluster-{k}" if isinstance(k, int) else k.removesuffix(".gguf")) + suffix
            write(adapter, directory / name)
        tasks |= dict.fromkeys(served, name)
    tasks |= {task: None for task, adapter in pack.tasks.items() if adapter is None}
    tasks = dict(sorted(tasks.items()))
    write_json(directory / "tasks.json", tasks)
    return tasks


def _write_mlx(pack: Pack, adapter: Adapter, path: Path) -> None:
    if not isinstance(pack.manifest, PlainManifest):
        adapter.save(path, pack.manifest.base.n_layers)
        return
    path.mkdir()
    # Only files that the manifest verified, and nothing that lies beside them.
    for file in pack.files_of(path.name):
        pack.copy(file, path.parent / file)


def _write_gguf(adapter: Adapter | Compressed, path: Path, config: Mapping[str, Any]) -> None:
    if isinstance(adapter, Compressed):
        save_gguf(gguf_of(adapter), path, config)
    else:
        save_gguf_lora(adapter, path, config)


def _write_swift(pack: Pack, adapter: Adapter, path: Path) -> None:
    # mlx-swift replaces parameters without looking at their shapes, `Module.update`,
    # https://github.com/ml-explore/mlx-swift.
    adapter.save(path, n_layers(pack), own_ranks=True)


def _config(base: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(read_text(base / "config.json"))
    return config


def _gguf_config(base: Path) -> dict[str, Any]:
    """The config of a base model whose tensors in GGUF are known."""
    config = _config(base)
    if config.get("model_type") not in ARCHITECTURES:
        raise ModelError(
            f"{base / 'config.json'}: model_type is {config.get('model_type')!r}, whose names and"
            f" rows in GGUF are not known here; expected one of {', '.join(ARCHITECTURES)}"
        )
    return config
