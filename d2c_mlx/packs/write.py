"""Writing a pack: plain directories, or one compact file."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.layout_check import layout_problems
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.packs.pack import COMPACT, FORMAT, MANIFEST, VERSIONS, Pack, load_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import hash_file, write_dir, write_json

__all__ = ["rewrite_pack", "with_file", "write_compact_pack", "write_pack"]


def write_pack(
    directory: Path,
    adapters: Sequence[Adapter],
    *,
    model: str,
    config_hash: str,
    n_layers: int,
    budget: str,
    max_bytes: int | None,
    origins: Mapping[str, str] | None = None,
    ready: Callable[[Path], None] | None = None,
) -> Pack:
    """Write adapters and manifest, then check the files against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        adapters: one per cluster, each serving the tasks in its `sources`.
        model: name or hub id of the base model.
        config_hash: hex SHA-256 of the base model's config.json.
        n_layers: number of transformer blocks of the base model.
        budget: as the user wrote it.
        max_bytes: allowed bytes of all adapter files, or None.
        origins: task -> `owner/name@commit` of the adapter that was made for it, where it came
            from the hub.
        ready: as of `write_dir`.

    Raises:
        PackError: the files are larger than the budget, or an adapter would not load elsewhere;
            nothing is written.
    """
    with write_dir(directory, ready) as temporary:
        tasks: dict[str, str] = {}
        problems = []
        for k, adapter in enumerate(adapters):
            name = f"cluster-{k}"
            adapter.save(temporary / name, n_layers)
            problems += layout_problems(temporary / name, directory / name)
            tasks |= dict.fromkeys(adapter.sources, name)
        if problems:
            raise PackError(problems)
        base = {"model": model, "config_sha256": config_hash}
        budgeted = {"text": budget, "nbytes": max_bytes}
        about = {"base": base, "budget": budgeted, "origins": origins}
        _write_manifest(directory, temporary, "plain", about, tasks)
    return load_pack(directory)


def write_compact_pack(
    directory: Path,
    adapters: Sequence[Compressed],
    serves: Mapping[str, int | None],
    *,
    model: str,
    config_hash: str,
    n_layers: int,
    budget: str,
    max_bytes: int | None,
    dtype: mx.Dtype = mx.float16,
    merged: Mapping[int, int] | None = None,
    origins: Mapping[str, str] | None = None,
    ready: Callable[[Path], None] | None = None,
) -> Pack:
    """Write all adapters into one file, and the manifest; check the file against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        adapters: in low-bit factors, all of one group size.
        serves: task -> position in `adapters`, or None to leave it to the base model.
        model: name or hub id of the base model.
        config_hash: hex SHA-256 of the base model's config.json.
        n_layers: number of transformer blocks of the base model.
        budget: as the user wrote it.
        max_bytes: allowed bytes of the adapter file, or None.
        dtype: of the base's activations, which `Pack.load` and `unpack` give.
        merged: position -> how many adapters are in it; None is one for each task that it serves.
        origins: as of `write_pack`.
        ready: as of `write_dir`.

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
        about = {
            "base": {"model": model, "config_sha256": config_hash, "n_layers": n_layers},
            "dtype": str(dtype).split(".")[-1],
            "budget": {"text": budget, "nbytes": max_bytes},
            "origins": origins,
        }
        _write_manifest(directory, temporary, "compact", about, serves, merged)
    return load_pack(directory)


def rewrite_pack(
    pack: Pack,
    changed: Mapping[str, Adapter],
    tasks: Mapping[str, str],
    merged: Mapping[str, int],
    budget: str,
    max_bytes: int | None,
    n_layers: int = 0,
    origins: Mapping[str, str] | None = None,
) -> Pack:
    """Replace a plain pack by one with some adapters changed; files of the others are copied.

    Args:
        pack: what `load_pack` verified.
        changed: directory -> adapter, new ones too.
        tasks: task -> directory; directories that serve none are left out.
        merged: directory -> how many adapters are in it.
        budget: as the user wrote it.
        max_bytes: allowed bytes of all adapter files, or None.
        n_layers: number of transformer blocks of the base model, for what is changed.
        origins: as of `write_pack`.

    Raises:
        PackError: the files are larger than the budget; the pack stays as it is.
    """
    with write_dir(pack.path) as temporary:
        for name in sorted(set(tasks.values())):
            if name in changed:
                changed[name].save(temporary / name, n_layers)
                continue
            (temporary / name).mkdir()
            for file in pack.files_of(name):
                shutil.copyfile(pack.path / file, temporary / file)
        budgeted = {"text": budget, "nbytes": max_bytes}
        about = {"base": pack.manifest["base"], "budget": budgeted, "origins": origins}
        _write_manifest(pack.path, temporary, "plain", about, tasks, merged)
    return load_pack(pack.path)


def with_file(pack: Pack, name: str, write: Callable[[Path], None]) -> Pack:
    """Replace a pack by one with another file beside its adapters; its bytes count.

    Args:
        pack: what `load_pack` verified.
        name: of the file; one of that name is replaced.
        write: writes it to a path.

    Raises:
        PackError: the files are larger than the budget; the pack stays as it is.
    """
    with write_dir(pack.path) as temporary:
        for file in pack.manifest["files"]:
            if file != name:
                (temporary / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(pack.path / file, temporary / file)
        write(temporary / name)
        keys = {"base", "dtype", "budget", "origins"} & pack.manifest.keys()
        about = {key: pack.manifest[key] for key in sorted(keys)}
        merged = {key: pack.merged(key) for key in pack.adapters}
        _write_manifest(pack.path, temporary, pack.storage, about, pack.tasks, merged)
    return load_pack(pack.path)


def _write_manifest(
    directory: Path,
    temporary: Path,
    storage: str,
    about: Mapping[str, Any],
    tasks: Mapping[str, Any],
    merged: Mapping[Any, int] | None = None,
) -> None:
    """Sizes and hashes of what is in `temporary` -> its manifest.

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
    max_bytes = about["budget"]["nbytes"]
    if max_bytes is not None and nbytes > max_bytes:
        raise PackError(f"{directory}: {nbytes:,} bytes, over the budget of {max_bytes:,}")
    served = Counter(map(str, tasks.values()))
    counts = {str(key): n for key, n in (merged or {}).items()}
    counts = {key: n for key, n in sorted(counts.items()) if n != served[key]}
    manifest = {
        "format": FORMAT,
        "format_version": VERSIONS[storage],
        "storage": storage,
        **about,
        "tasks": dict(sorted(tasks.items())),
        "merged": counts,
        "files": files,
        "nbytes": nbytes,
    }
    # Most packs have neither, and are what version 1 always was.
    rare = {key for key in ("origins", "merged") if not manifest.get(key)}
    write_json(temporary / MANIFEST, {k: v for k, v in manifest.items() if k not in rare})
