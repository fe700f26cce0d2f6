"""The adapters of a pack for other programs: written in their formats, and checked by their rules.

What a reader would ignore silently is resolved before: every export has one scale, folded in where
scales differ, one rank but in GGUF, and neither rsLoRA nor patterns.
"""

import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.checks import check_base
from d2c_mlx.adapters.gguf_format import save_gguf
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.adapters.peft_format import save_peft
from d2c_mlx.packs.overwrite import check_output, mark
from d2c_mlx.packs.pack import Pack, load_pack
from d2c_mlx.utils.errors import ConfigError, PackError, gather
from d2c_mlx.utils.files import read_text, write_dir, write_json

FORMATS = ("mlx", "mlx-swift", "peft", "gguf")
# Program -> the export that it reads. docs/reference/formats.md has their sources, and what each
# passes over without a word.
READERS = {
    "mlx-swift": "mlx",
    "mlx-lm": "mlx",
    "PEFT": "peft",
    "llama.cpp": "gguf",
    "vllm-metal": "peft",
    "ExecuTorch": "peft",
    "MNN": "peft",
}
# The ranks that vLLM reserves end there.
_MOST_RANK = 512


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
    check = partial(check_output, directory, "export", [("pack", pack.path)], model=model)
    check()
    if to not in FORMATS:
        raise ConfigError(f"to: {to!r}, expected one of {', '.join(FORMATS)}")
    to_gguf = to == "gguf" and pack.storage != "gguf"
    base = pack.base_directory(model) if to_gguf or model is not None else None
    config = json.loads(read_text(base / "config.json")) if base else None
    if to == "peft":
        check_base(pack.path, config, pack.manifest.model)
    # Another command may have written there in the meantime.
    with write_dir(directory, lambda _: check()) as temporary, pack.reading():
        tasks = write_adapters(pack, temporary, to, config)
        mark(temporary, "export")
    return tasks


def write_adapters(
    pack: Pack, directory: Path, to: str = "mlx", config: dict[str, Any] | None = None
) -> dict[str, str | None]:
    """Write what `export` writes into an empty directory, without checks and marker.

    Args:
        pack: what `load_pack` verified.
        directory: an empty one.
        to: one of `FORMATS`.
        config: of the base model's config.json, for `gguf` and, if it is at hand, `peft`.
    """
    tasks: dict[str, str | None] = dict.fromkeys(sorted(pack.tasks))
    for key, served in pack.adapters.items():
        name = adapter_name(key) + (".gguf" if to == "gguf" else "")
        path = directory / name
        adapter = pack.load(served[0], mx.float16 if to == "gguf" else None)
        if adapter is None:
            continue
        tasks |= dict.fromkeys(served, name)
        if pack.storage == {"mlx": "plain", "gguf": "gguf"}.get(to):
            # Only files that the manifest verified, and nothing that lies beside them.
            pack.copy_all(pack.files_of(str(key)), directory)
        elif to == "gguf":
            save_gguf(adapter, path, config or {})
        elif to == "peft":
            save_peft(adapter, path, config=config, n_layers=pack.n_layers)
        else:
            # mlx-swift replaces parameters without looking at their shapes, `Module.update`,
            # https://github.com/ml-explore/mlx-swift.
            adapter.save(path, pack.n_layers, own_ranks=to == "mlx-swift")
    write_json(directory / "tasks.json", tasks)
    return tasks


def adapter_name(key: str | int) -> str:
    """The name of an adapter's export, by its key in `Pack.adapters`."""
    return f"cluster-{key}" if isinstance(key, int) else key.removesuffix(".gguf")


def unpacked_nbytes(pack: Pack) -> int:
    """Bytes of the plain adapters that `export` to `mlx` would write, as programs load them."""
    if pack.storage == "plain":
        return pack.nbytes
    adapters = (pack.load(served[0]) for served in pack.adapters.values())
    return sum(adapter.nbytes(pack.manifest.n_layers) for adapter in adapters if adapter)


def verify(directory: str | Path, runtime: str | None = None, model: str | None = None) -> Pack:
    """Check a pack's files, every adapter's values and, for a runtime, whether it can load them.

    Use it where a pack arrives from elsewhere; `load_pack` alone does not read adapters' values.

    Args:
        directory: of the pack.
        runtime: a key of `READERS`. The pack is exported to a temporary directory for it; the
            layout of a plain pack is always checked.
        model: as for `export`, which asks for it for llama.cpp; checked for every runtime.

    Returns:
        The pack.

    Raises:
        InputError: every problem found, one line each.
    """
    if runtime not in (None, *READERS):
        raise ConfigError(f"for: {runtime!r}, expected one of {', '.join(READERS)}")
    pack = load_pack(directory)
    adapters = gather(partial(pack.load, served[0]) for served in pack.adapters.values())
    if runtime is None:
        if model is not None:
            pack.base_directory(model)
        return pack
    problems = []
    for key, adapter in zip(pack.adapters, adapters):
        keys = Counter(path.rpartition(".")[2] for path in adapter.modules) if adapter else {}
        lacking = {module: n for module, n in sorted(keys.items()) if n != pack.n_layers}
        problem = ""
        if runtime == "vllm-metal" and adapter and adapter.rank > _MOST_RANK:
            problem = f"rank {adapter.rank}, at most {_MOST_RANK} is taken; give run --merge-rank"
        if runtime in ("ExecuTorch", "MNN") and lacking:
            # They take names of modules, for all blocks.
            module, n = next(iter(lacking.items()))
            problem = (
                f"{len(lacking)} modules are in some blocks only (first: {module}, in {n} of"
                f" {pack.n_layers})"
            )
        problems += [f"{pack.path}/{adapter_name(key)}: {problem}"] if problem else []
    with tempfile.TemporaryDirectory() as temporary:
        written, to = Path(temporary) / "written", READERS[runtime]
        names = sorted({name for name in export(pack, to, written, model).values() if name})
        for name in names if to == "mlx" else ():
            problems += layout_problems(written / name, pack.path / name)
    if problems:
        raise PackError(problems)
    return pack
