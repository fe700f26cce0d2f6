"""A pack that changes: list its adapters, remove tasks, keep other processes out meanwhile.

    d2c-mlx add PACK loras/gec-nl --tasks tasks
    d2c-mlx remove PACK gec-de
    d2c-mlx list PACK

`add.py` adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2c_mlx.compress.compressed import Compressed
from d2c_mlx.packs.manifest import MANIFEST
from d2c_mlx.packs.overwrite import MARKER, all_files
from d2c_mlx.packs.pack import Pack, load_pack, pack_directory
from d2c_mlx.packs.write import rewrite_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import locked, old_dir

__all__ = ["list_pack", "opened", "remove_tasks"]

# What pushing and downloading leave in a pack, which a change may remove.
_LEFT = {MANIFEST, MARKER, ".gitattributes", ".cache"}


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
