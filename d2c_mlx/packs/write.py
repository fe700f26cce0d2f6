"""Writing a pack of any storage, and changing one while no other process does.

    d2c-mlx add PACK loras/gec-nl --tasks tasks
    d2c-mlx remove PACK gec-de
    d2c-mlx list PACK

`add.py` adds.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.mlx_format import layout_problems
from d2c_mlx.compress.budget import Budget
from d2c_mlx.compress.compact_file import COMPACT, write_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.packs.manifest import MANIFEST, Manifest, PackFile
from d2c_mlx.packs.overwrite import MARKER, all_files, check_replaced
from d2c_mlx.packs.pack import Pack, load_pack, pack_directory
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import copy_file, hash_file, locked, old_dir, write_dir, write_json

# Files that pushing and downloading leave in a pack; a change may remove them.
_LEFT = {MANIFEST, MARKER, ".gitattributes", ".cache"}


def write_pack(
    directory: Path,
    adapters: Sequence[Any],
    about: Manifest,
    serves: Mapping[str, int | None] | None = None,
    ready: Callable[[Path], object] | None = None,
) -> Pack:
    """Write a pack, then check its files against the budget.

    Args:
        directory: replaced as a whole, only once everything is in it.
        adapters: an `Adapter` per cluster for a plain pack, which has a directory of each;
            `Compressed`, all of one group size, for one in one file; or, if `about` has `gguf`,
            files for llama.cpp, which are copied.
        about: what the manifest says of the pack; `storage`, `tasks` and `files` follow.
        serves: task -> position of its adapter, None for the base model; in a plain pack None,
            where each serves the tasks in its `sources`.
        ready: see `write_dir`.

    Raises:
        PackError: the files are larger than the budget, or an adapter would not load elsewhere;
            nothing is written.
    """
    storage = "plain" if serves is None else "gguf" if about.gguf else "compact"
    if serves is None:
        serves = {task: k for k, adapter in enumerate(adapters) for task in adapter.sources}
    tasks: dict[str, str | int | None] = dict(serves)
    if storage != "compact":
        end = ".gguf" if storage == "gguf" else ""
        tasks = {task: None if k is None else f"cluster-{k}{end}" for task, k in serves.items()}
    about = about.model_copy(update={"storage": storage, "tasks": tasks})
    with _replacing(directory, about, ready) as temporary:
        problems = []
        if storage == "compact":
            write_compact(temporary / COMPACT, adapters)
        for k, adapter in enumerate(adapters) if storage != "compact" else ():
            if storage == "gguf":
                copy_file(adapter, temporary / f"cluster-{k}.gguf")
            else:
                name = f"cluster-{k}"
                adapter.save(temporary / name, about.n_layers)
                problems += layout_problems(temporary / name, directory / name)
        if problems:
            raise PackError(problems)
    return load_pack(directory)


def rewrite_pack(
    pack: Pack,
    tasks: Mapping[str, str | int | None],
    changed: Mapping[Any, Any],
    update: Mapping[str, Any],
    merged: Mapping[Any, int] | None = None,
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
    place: dict[Any, Any] = {key: k if compact else key for k, key in enumerate(keys)}
    counts = {key: pack.merged(key) for key in pack.adapters} | dict(merged or {})
    facts = {
        "tasks": {task: place.get(key) for task, key in tasks.items()},
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


def with_file(pack: Pack, name: str, content: bytes, budget: Budget | None = None) -> Pack:
    """Replace a pack by one with another file beside its adapters; its bytes count.

    Args:
        pack: what `load_pack` verified.
        name: of the file; one of that name is replaced.
        content: of the file.
        budget: bytes for the pack with the file; None keeps the pack's own.

    Raises:
        PackError: the files are larger than the budget; the pack stays as it is.
    """
    about = pack.manifest
    if budget:
        about = about.model_copy(update={"budget": budget.text, "max_bytes": budget.nbytes})
    with _replacing(pack.path, about) as temporary:
        pack.copy_all((file for file in pack.manifest.files if file != name), temporary)
        (temporary / name).write_bytes(content)
    return load_pack(pack.path)


@contextmanager
def opened(directory: Path) -> Iterator[Pack]:
    """A verified pack that no other process changes while the block runs.

    Use it around every change of a pack; `load_pack` is enough to read one.

    Args:
        directory: of the pack. Its parent is locked.

    Raises:
        InputError: see `load_pack` and `check_replaced`; nothing is changed, and where there is no
            pack, nothing is made.
        D2CError: another process is at work on it.
    """
    path = pack_directory(directory).resolve()
    # Locking makes the directory of its file, so not before there is a pack to hold.
    if not any((folder / MANIFEST).is_file() for folder in (path, old_dir(path))):
        load_pack(path)
    advice = "it may replace the pack; wait for it, then give this command again"
    with locked(path.parent, advice=advice):
        pack = load_pack(directory)
        ours = {*(path / name for name in pack.manifest.files), *(path / name for name in _LEFT)}
        files = all_files(path)
        check_replaced(path, (file for file in files if not {file, *file.parents} & ours))
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
    none = {"adapter": None, "tasks": bare, "merged": 0, "rank": 0, "nbytes": 0}
    return [*rows, none] if bare else rows


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
def _replacing(
    directory: Path, about: Manifest, ready: Callable[[Path], object] | None = None
) -> Iterator[Path]:
    """Yield a directory for a pack's files; add the manifest of what is in it, and replace.

    `about` is the manifest but for `files`. Raises PackError if they are larger than the budget.
    """
    with write_dir(directory, ready) as temporary:
        yield temporary
        served, tasks = Counter(map(str, about.tasks.values())), sorted(about.tasks)
        counts, files = sorted(about.merged.items()), {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            entry = PackFile(nbytes=path.stat().st_size, sha256=hash_file(path))
            files[path.relative_to(temporary).as_posix()] = entry
        update = {
            "tasks": {task: about.tasks[task] for task in tasks},
            "systems": {task: about.systems[task] for task in tasks if task in about.systems},
            "merged": {key: n for key, n in counts if key in served and n != served[key]},
            "files": files,
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
