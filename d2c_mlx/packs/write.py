"""Writing a pack of any storage, and changing one while no other process does.

    d2c-mlx add PACK loras/gec-nl --tasks tasks
    d2c-mlx remove PACK gec-de
    d2c-mlx list PACK

`add.py` adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.compress.budget import Budget
from d2c_mlx.compress.compact_file import write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.packs.manifest import COMPACT, MANIFEST, Manifest, PackFile
from d2c_mlx.packs.overwrite import MARKER, all_files
from d2c_mlx.packs.pack import Pack, load_pack, pack_directory
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import (
    copy_file,
    hash_file,
    hash_tree,
    locked,
    old_dir,
    write_dir,
    write_json,
)
from d2c_mlx.utils.parsing import json_or_none

__all__ = [
    "list_pack",
    "opened",
    "remove_tasks",
    "rewrite_pack",
    "with_file",
    "write_compact_pack",
    "write_gguf_pack",
    "write_pack",
]

# Files that pushing and downloading leave in a pack; a change may remove them.
_LEFT = {MANIFEST, MARKER, ".gitattributes", ".cache"}
# Called with the complete pack before it takes its place, see `write_dir`.
Ready = Callable[[Path], None]


def write_pack(
    directory: Path, adapters: Sequence[Adapter], about: Manifest, ready: Ready | None = None
) -> Pack:
    """Write a pack of directories, then check its files against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        adapters: one per cluster, each serving the tasks in its `sources`.
        about: what the manifest says of the pack; `tasks` and `files` follow from the adapters.
        ready: see `write_dir`.

    Raises:
        PackError: the files are larger than the budget, or an adapter would not load elsewhere;
            nothing is written.
    """
    tasks = {task: f"cluster-{k}" for k, adapter in enumerate(adapters) for task in adapter.sources}
    about = about.model_copy(update={"storage": "plain", "tasks": tasks})
    with _replacing(directory, about, ready) as temporary:
        problems = []
        for k, adapter in enumerate(adapters):
            name = f"cluster-{k}"
            adapter.save(temporary / name, about.n_layers)
            problems += layout_problems(temporary / name, directory / name)
        if problems:
            raise PackError(problems)
    return load_pack(directory)


def write_compact_pack(
    directory: Path,
    adapters: Sequence[Compressed],
    serves: Mapping[str, int | None],
    about: Manifest,
    ready: Ready | None = None,
) -> Pack:
    """Write a pack in one file of low-bit factors, all of one group size, as `write_pack` does.

    `serves` says for each task the position of its adapter; None leaves it to the base model.
    """
    about = about.model_copy(update={"storage": "compact", "tasks": serves})
    with _replacing(directory, about, ready) as temporary:
        write_compact(temporary / COMPACT, adapters)
    return load_pack(directory)


def write_gguf_pack(
    directory: Path,
    files: Sequence[Path],
    serves: Mapping[str, int | None],
    about: Manifest,
    ready: Ready | None = None,
) -> Pack:
    """Write a pack of files for llama.cpp, copied as `cluster-<k>.gguf`, as `write_pack` does.

    `serves` is that of `write_compact_pack`, and `about` has `gguf`.
    """
    tasks = {task: None if k is None else f"cluster-{k}.gguf" for task, k in serves.items()}
    about = about.model_copy(update={"storage": "gguf", "tasks": tasks})
    with _replacing(directory, about, ready) as temporary:
        for k, file in enumerate(files):
            copy_file(file, temporary / f"cluster-{k}.gguf")
    return load_pack(directory)


def rewrite_pack(
    pack: Pack,
    tasks: Mapping[str, str | int | None],
    changed: Mapping[Any, Any],
    update: Mapping[str, Any],
    merged: Mapping[str, int] | None = None,
) -> Pack:
    """Replace a pack by one of other tasks, with some adapters changed; other files are copied.

    Args:
        pack: what `load_pack` verified.
        tasks: task -> adapter as in `Pack.tasks`, or a new one. Adapters that serve none are left
            out; in a compact pack those behind them move up.
        changed: new and changed adapters, as the pack stores them; none in a GGUF pack.
        update: other fields of the manifest that change.
        merged: number of adapters in a changed one, where that changes.

    Raises:
        PackError: the files are larger than the budget; the pack stays as it is.
    """
    compact = pack.storage == "compact"
    keys: list[Any] = sorted({key for key in tasks.values() if key is not None})
    place: dict[Any, str | int] = {key: k if compact else key for k, key in enumerate(keys)}
    counts: dict[Any, int] = {key: pack.merged(key) for key in pack.adapters}
    counts |= merged or {}
    facts = {
        "tasks": {task: None if key is None else place[key] for task, key in tasks.items()},
        "merged": {str(place[key]): n for key, n in counts.items() if key in place},
    }
    about = pack.manifest.model_copy(update={**update, **facts})
    with _replacing(pack.path, about) as temporary:
        if compact:
            stored = {**pack.compressed(), **changed}
            write_compact(temporary / COMPACT, [stored[key] for key in keys])
        for name in () if compact else keys:
            if name in changed:
                changed[name].save(temporary / name, pack.n_layers)
            else:
                pack.copy_all(pack.files_of(name), temporary)
    return load_pack(pack.path)


def with_file(
    pack: Pack, name: str, write: Callable[[Path], object], budget: Budget | None = None
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
    about = pack.manifest
    if budget:
        about = about.model_copy(update={"budget": budget.text, "max_bytes": budget.nbytes})
    digest = hash_tree(pack.path)
    with _replacing(pack.path, about) as temporary:
        pack.copy_all((file for file in pack.manifest.files if file != name), temporary)
        write(temporary / name)
    # A run that made the pack goes on to take it for its own, as the adapters are the same. Its
    # later stages read the pack, so it is not finished.
    path = pack.path.resolve()
    record = path.parent / ".stages" / "pack.json"
    content = None if record.parent.is_symlink() else json_or_none(record)
    if isinstance(content, dict) and content.get("outputs") == {path.name: digest}:
        write_json(record, {**content, "outputs": {path.name: hash_tree(path)}})
        record.with_name("finish.json").unlink(missing_ok=True)
    return load_pack(pack.path)


@contextmanager
def opened(directory: Path) -> Iterator[Pack]:
    """A verified pack that no other process changes while the block runs.

    Use it around every change of a pack; `load_pack` is enough to read one.

    Args:
        directory: of the pack. Its parent is locked.

    Raises:
        PackError: see `load_pack`, or files in it are not the pack's; nothing is changed, and where
            there is no pack, nothing is made.
        D2CError: another process is at work on it.
    """
    path = pack_directory(directory).resolve()
    # Locking makes the directory of its file, so not before there is a pack to hold.
    if not any((folder / MANIFEST).is_file() for folder in (path, old_dir(path))):
        load_pack(path)
    advice = "it may replace the pack; wait for it, then give this command again"
    with locked(path.parent, advice=advice):
        pack = load_pack(directory)
        if path in (here := Path.cwd(), *here.parents):
            raise PackError(
                f"{pack.path}: is replaced as a whole, and you are in it; give this command"
                " elsewhere"
            )
        names = (file.relative_to(path) for file in all_files(path))
        foreign = {name.parts[0] for name in names if name.as_posix() not in pack.manifest.files}
        if foreign := foreign - _LEFT:
            raise PackError(
                f"{pack.path}: is replaced as a whole, and {', '.join(sorted(foreign)[:5])} in it"
                " is not the pack's; move it elsewhere (d2c-mlx push writes a README.md and a"
                " tasks.json again)"
            )
        yield pack


def list_pack(pack: Pack) -> list[dict[str, Any]]:
    """List the adapters of a pack, for people.

    Returns:
        For every adapter `adapter`, `tasks`, `merged` (number of adapters in it), `rank` and
        `nbytes` of its files or, in a compact pack, of its factors. Tasks that the base model
        serves come last, with the adapter None.
    """
    rows: list[dict[str, Any]] = []
    for key, tasks in pack.adapters.items():
        stored = pack.stored(tasks[0])
        if isinstance(stored, Compressed):
            rank = max(sum(level.rank for level in levels) for levels in stored.modules.values())
            nbytes = stored.nbytes
        else:
            rank, nbytes = stored.rank if stored else 0, sum(pack.files_of(str(key)).values())
        row = {"adapter": key, "tasks": tasks, "merged": pack.merged(key), "rank": rank}
        rows.append({**row, "nbytes": nbytes})
    bare = [task for task, key in pack.tasks.items() if key is None]
    if bare:
        rows.append({"adapter": None, "tasks": bare, "merged": 0, "rank": 0, "nbytes": 0})
    return rows


def remove_tasks(pack: Pack, tasks: Sequence[str]) -> Pack:
    """Remove tasks, and adapters that serve no other; the pack is replaced as a whole.

    A merge that serves other tasks stays as it is: what the removed task put into it cannot be
    taken out again.

    Args:
        pack: what `load_pack` verified, held by `opened`.
        tasks: one or more of its tasks.

    Raises:
        PackError: unknown tasks, or none would be left; the pack stays as it is.
    """
    unknown = sorted(set(tasks) - pack.tasks.keys())
    if unknown:
        raise PackError(
            f"{pack.path}: no task {', '.join(map(repr, unknown))}; it serves"
            f" {', '.join(pack.tasks)}"
        )
    left = {task: key for task, key in pack.tasks.items() if task not in tasks}
    if not left:
        raise PackError(f"{pack.path}: no task would be left; delete the directory instead")
    # The origin of a removed task is kept while its adapter may be in a merge. Which merge an
    # earlier one was in is not known; it is none once no adapter holds more than it serves.
    serving = Counter(key for key in left.values() if key is not None)
    orphans = any(pack.merged(key) > n for key, n in serving.items())
    origins = {
        task: origin
        for task, origin in pack.manifest.origins.items()
        if task in left or (pack.tasks[task] in serving if task in pack.tasks else orphans)
    }
    return rewrite_pack(pack, left, {}, {"origins": origins})


@contextmanager
def _replacing(directory: Path, about: Manifest, ready: Ready | None = None) -> Iterator[Path]:
    """Yield a directory for a pack's files; add the manifest of what is in it, and replace.

    `about` is the manifest but for `files`. Raises PackError if they are larger than the budget.
    """
    with write_dir(directory, ready) as temporary:
        yield temporary
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        served, tasks = Counter(map(str, about.tasks.values())), sorted(about.tasks)
        counts = sorted(about.merged.items())
        update = {
            "tasks": {task: about.tasks[task] for task in tasks},
            "systems": {task: about.systems[task] for task in tasks if task in about.systems},
            "merged": {key: n for key, n in counts if key in served and n != served[key]},
            "files": {
                path.relative_to(temporary).as_posix(): PackFile(
                    nbytes=path.stat().st_size, sha256=hash_file(path)
                )
                for path in paths
            },
        }
        manifest = about.model_copy(update=update)
        # The budget counts adapter files, not the manifest: otherwise 25 % of 24 equal adapters
        # would hold five.
        if about.max_bytes is not None and manifest.nbytes > about.max_bytes:
            raise PackError(
                f"{directory}: {manifest.nbytes:,} bytes, over the budget of {about.max_bytes:,};"
                f" give one that has room, --budget {manifest.nbytes}B or more"
            )
        write_json(temporary / MANIFEST, manifest.to_json())
