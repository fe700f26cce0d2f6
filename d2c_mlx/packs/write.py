"""Writing a pack: plain directories, or one compact file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.compress.budget import Budget
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.packs.pack import COMPACT, FORMAT, MANIFEST, VERSIONS, Pack, PackInfo, load_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import copy_file, hash_file, write_dir, write_json

__all__ = ["rewrite_pack", "with_file", "write_compact_pack", "write_gguf_pack", "write_pack"]

# Called with the complete pack before it takes its place, see `write_dir`.
Ready = Callable[[Path], None]


def write_pack(
    directory: Path, adapters: Sequence[Adapter], info: PackInfo, ready: Ready | None = None
) -> Pack:
    """Write a pack of directories, then check its files against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        adapters: one per cluster, each serving the tasks in its `sources`.
        info: what the manifest says of the pack, `merged` by `cluster-<k>`.
        ready: see `write_dir`.

    Raises:
        PackError: the files are larger than the budget, or an adapter would not load elsewhere;
            nothing is written.
    """
    with write_dir(directory, ready) as temporary:
        tasks: dict[str, str] = {}
        problems = []
        for k, adapter in enumerate(adapters):
            name = f"cluster-{k}"
            adapter.save(temporary / name, info.n_layers)
            problems += layout_problems(temporary / name, directory / name)
            tasks |= dict.fromkeys(adapter.sources, name)
        if problems:
            raise PackError(problems)
        _write_manifest(directory, temporary, info, tasks)
    return load_pack(directory)


def write_compact_pack(
    directory: Path,
    adapters: Sequence[Compressed],
    serves: Mapping[str, int | None],
    info: PackInfo,
    ready: Ready | None = None,
) -> Pack:
    """Write a pack in one file, then check it against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        adapters: in low-bit factors, all of one group size.
        serves: task -> position in `adapters`, or None to leave it to the base model.
        info: what the manifest says of the pack, `merged` by position.
        ready: see `write_dir`.

    Raises:
        PackError: the file is larger than the budget, or the adapters do not go together; nothing
            is written.
    """
    wrong = {
        task: k for task, k in serves.items() if k is not None and k not in range(len(adapters))
    }
    if wrong:
        task, k = next(iter(wrong.items()))
        raise PackError(f"{directory}: task {task!r} has adapter {k} of {len(adapters)}")
    with write_dir(directory, ready) as temporary:
        write_compact(temporary / COMPACT, adapters)
        _write_manifest(directory, temporary, info, serves)
    return load_pack(directory)


def write_gguf_pack(
    directory: Path,
    files: Sequence[Path],
    serves: Mapping[str, int | None],
    info: PackInfo,
    ready: Ready | None = None,
) -> Pack:
    """Write a pack of files that llama.cpp reads, then check them against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        files: one per adapter, copied as `cluster-<k>.gguf`.
        serves: task -> position in `files`, or None to leave it to the base model.
        info: what the manifest says of the pack, `gguf` too, `merged` by file.
        ready: see `write_dir`.

    Raises:
        PackError: the files are larger than the budget; nothing is written.
    """
    names = [f"cluster-{k}.gguf" for k in range(len(files))]
    with write_dir(directory, ready) as temporary:
        for name, file in zip(names, files):
            copy_file(file, temporary / name)
        tasks = {task: None if k is None else names[k] for task, k in serves.items()}
        _write_manifest(directory, temporary, info, tasks)
    return load_pack(directory)


def rewrite_pack(
    pack: Pack, changed: Mapping[str, Adapter], tasks: Mapping[str, str], info: PackInfo
) -> Pack:
    """Replace a plain pack by one with some adapters changed; files of the others are copied.

    Args:
        pack: what `load_pack` verified.
        changed: directory -> adapter, new ones too.
        tasks: task -> directory; directories that serve none are left out.
        info: as of `write_pack`; `n_layers` is needed only where something is changed.

    Raises:
        PackError: the files are larger than the budget; the pack stays as it is.
    """
    with write_dir(pack.path) as temporary:
        for name in sorted(set(tasks.values())):
            if name in changed:
                changed[name].save(temporary / name, info.n_layers)
                continue
            (temporary / name).mkdir()
            for file in pack.files_of(name):
                pack.copy(file, temporary / file)
        _write_manifest(pack.path, temporary, info, tasks)
    return load_pack(pack.path)


def with_file(
    pack: Pack, name: str, write: Callable[[Path], None], budget: Budget | None = None
) -> Pack:
    """Replace a pack by one with another file beside its adapters; its bytes count.

    Args:
        pack: what `load_pack` verified.
        name: of the file; one of that name is replaced.
        write: writes it to a path.
        budget: bytes for the pack with the file; None keeps the pack's own.

    Raises:
        PackError: the files are larger than the budget; the pack stays as it is.
    """
    info = pack.info
    if budget:
        info = replace(info, budget=budget.text, max_bytes=budget.nbytes)
    with write_dir(pack.path) as temporary:
        for file in pack.manifest.files:
            if file != name:
                (temporary / file).parent.mkdir(exist_ok=True)
                pack.copy(file, temporary / file)
        write(temporary / name)
        _write_manifest(pack.path, temporary, info, pack.tasks, by_name=True)
    return load_pack(pack.path)


def _write_manifest(
    directory: Path,
    temporary: Path,
    info: PackInfo,
    tasks: Mapping[str, Any],
    by_name: bool = False,
) -> None:
    """Write the manifest of the files in `temporary`.

    Args:
        directory: of the pack, for messages.
        temporary: where its files are.
        info: what the manifest says beside tasks and files.
        tasks: task -> adapter.
        by_name: sort what `info` says by its keys, as packs with a router always had it: a change
            of the order would change their hash.

    Raises:
        PackError: the files are larger than the budget.
    """
    files: dict[str, dict[str, Any]] = {
        file.relative_to(temporary).as_posix(): {
            "nbytes": file.stat().st_size,
            "sha256": hash_file(file),
        }
        for file in sorted(temporary.rglob("*"))
        if file.is_file()
    }
    nbytes = sum(entry["nbytes"] for entry in files.values())
    # The budget counts adapter files, not the manifest: otherwise 25 % of 24 equal adapters would
    # hold five.
    if info.max_bytes is not None and nbytes > info.max_bytes:
        raise PackError(
            f"{directory}: {nbytes:,} bytes, over the budget of {info.max_bytes:,}; give one that"
            f" has room, --budget {nbytes}B or more"
        )
    storage = "gguf" if info.gguf else "compact" if COMPACT in files else "plain"
    served = Counter(map(str, tasks.values()))
    systems = {task: info.systems[task] for task in sorted(tasks) if task in info.systems}
    counts = sorted((str(key), n) for key, n in info.merged.items())
    said = _said(storage, info)
    manifest = {
        "format": FORMAT,
        "format_version": VERSIONS[storage],
        "storage": storage,
        **(dict(sorted(said.items())) if by_name else said),
        "tasks": dict(sorted(tasks.items())),
        "systems": systems,
        "merged": {key: n for key, n in counts if n != served[key]},
        "files": files,
        "nbytes": nbytes,
    }
    # Most packs have none of these, and are what version 1 always was.
    rare = {key for key in ("origins", "systems", "merged") if not manifest[key]}
    write_json(temporary / MANIFEST, {k: v for k, v in manifest.items() if k not in rare})


def _said(storage: str, info: PackInfo) -> dict[str, Any]:
    """Base, budget and origins; what packs that are not plain store, in one."""
    base: dict[str, Any] = {"model": info.model, "config_sha256": info.config_hash}
    dtype: dict[str, Any] = {}
    if info.weights_hash is not None:
        base["weights_sha256"] = info.weights_hash
    if storage != "plain":
        base["n_layers"] = info.n_layers
        dtype["dtype"] = str(info.dtype).split(".")[-1]
    if info.gguf:
        dtype["gguf"] = info.gguf.model_dump(mode="json")
    budget = {"text": info.budget, "nbytes": info.max_bytes}
    return {"base": base, **dtype, "budget": budget, "origins": dict(info.origins)}
