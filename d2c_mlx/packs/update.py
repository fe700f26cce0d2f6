"""A pack that changes: list its adapters, remove tasks, keep other processes out meanwhile.

    d2c-mlx add PACK loras/gec-nl --tasks tasks
    d2c-mlx remove PACK gec-de
    d2c-mlx list PACK

`add.py` adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.packs.manifest import COMPACT, MANIFEST
from d2c_mlx.packs.overwrite import MARKER, all_files
from d2c_mlx.packs.pack import Pack, load_pack, pack_directory
from d2c_mlx.packs.write import rewrite_pack, write_compact_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import old_dir, restore_dir
from d2c_mlx.utils.lock import locked

__all__ = ["list_pack", "opened", "read_stored", "remove_tasks", "rewrite_compact"]

# Files of pushing and downloading beside a pack, which a change may remove.
_LEFT, _DOWNLOADS = (MARKER, ".gitattributes"), ".cache"


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
        # Remains of a change that was killed.
        restore_dir(path)
        pack = load_pack(pack_directory(directory))
        if path in (here := Path.cwd(), *here.parents):
            raise PackError(
                f"{pack.path}: is replaced as a whole, and you are in it; give this command"
                " elsewhere"
            )
        own = {path / name for name in (MANIFEST, *_LEFT, *pack.manifest.files)}
        foreign = (file for file in all_files(path) if file not in own)
        tops = {file.relative_to(path).parts[0] for file in foreign} - {_DOWNLOADS}
        if tops:
            raise PackError(
                f"{pack.path}: is replaced as a whole, and {', '.join(sorted(tops)[:5])} in it is"
                " not the pack's; move it elsewhere (d2c-mlx push writes a README.md and a"
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
            ranks = [sum(level.rank for level in levels) for levels in stored.modules.values()]
            rank, nbytes = max(ranks), stored.nbytes
        else:
            rank, nbytes = stored.rank if stored else 0, sum(pack.files_of(str(key)).values())
        rows.append({"adapter": key, "tasks": tasks, "merged": pack.merged(key),
                     "rank": rank, "nbytes": nbytes})  # fmt: skip
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
    kept = [key for key in pack.adapters if key in left.values()]
    # The origin of a removed task is kept while its adapter may be in a merge. Which merge an
    # earlier one was in is not known; it is none once no adapter holds more than it serves.
    serving = Counter(left.values())
    orphans = any(pack.merged(key) > serving[key] for key in kept)
    origins = {
        task: origin
        for task, origin in pack.manifest.origins.items()
        if task in left or (pack.tasks[task] in kept if task in pack.tasks else orphans)
    }
    if pack.storage == "compact":
        return rewrite_compact(pack, kept, left, {"origins": origins})
    merged = {str(key): pack.merged(key) for key in kept}
    about = pack.manifest.model_copy(update={"tasks": left, "merged": merged, "origins": origins})
    return rewrite_pack(pack, {}, about)


def rewrite_compact(
    pack: Pack,
    kept: Sequence[str | int],
    tasks: Mapping[str, str | int | None],
    update: Mapping[str, Any],
    stored: Sequence[Compressed] | None = None,
) -> Pack:
    """Replace a compact pack by one of some of its adapters, whose positions move up.

    Args:
        pack: what `load_pack` verified.
        kept: their positions.
        tasks: task -> position before; one past the kept ones is an arrival's.
        update: other facts that change.
        stored: what is written; None is what the pack has at the positions.
    """
    place: dict[object, int] = {key: i for i, key in enumerate(kept)}
    serves = {task: None if k is None else place.get(k, len(kept)) for task, k in tasks.items()}
    merged = {str(place[key]): pack.merged(key) for key in kept}
    about = pack.manifest.model_copy(update={**update, "merged": merged})
    return write_compact_pack(pack.path, stored or read_stored(pack, kept), serves, about)


def read_stored(pack: Pack, keys: Sequence[str | int]) -> list[Compressed]:
    """Read adapters of a compact pack, by their positions."""
    with pack.reading([COMPACT]):
        return [read_compact(pack.path / COMPACT, int(key)) for key in keys]
