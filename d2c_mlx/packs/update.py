"""A pack that changes: list its adapters, remove tasks, keep other processes out meanwhile.

    d2c-mlx add PACK loras/gec-nl --tasks tasks
    d2c-mlx remove PACK gec-de
    d2c-mlx list PACK

`add.py` adds.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.compress.compact_file import read_compact
from d2c_mlx.packs.overwrite import MARKER, all_files
from d2c_mlx.packs.pack import COMPACT, MANIFEST, Pack, load_pack, pack_directory
from d2c_mlx.packs.write import rewrite_pack, write_compact_pack, write_gguf_pack
from d2c_mlx.utils.errors import PackError
from d2c_mlx.utils.files import old_dir, restore_dir
from d2c_mlx.utils.lock import locked

__all__ = ["list_pack", "opened", "remove_tasks"]

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
    if not any((one / MANIFEST).is_file() for one in (path, old_dir(path))):
        load_pack(path)
    advice = "it may replace the pack; wait for it, then give this command again"
    with locked(path.parent, advice=advice):
        # Remains of a change that was killed.
        restore_dir(path)
        pack = load_pack(pack_directory(directory))
        _check_replaceable(pack, path)
        yield pack


def _check_replaceable(pack: Pack, path: Path) -> None:
    """Refuse a pack whose replacement would take more with it than the pack."""
    if path in (here := Path.cwd(), *here.parents):
        raise PackError(
            f"{pack.path}: is replaced as a whole, and you are in it; give this command elsewhere"
        )
    own = {path / name for name in (MANIFEST, *_LEFT, *pack.manifest.files)}
    others = [file.relative_to(path).parts[0] for file in all_files(path) if file not in own]
    if found := sorted(set(others) - {_DOWNLOADS}):
        raise PackError(
            f"{pack.path}: is replaced as a whole, and {', '.join(found[:5])} in it"
            f" {'is' if len(found) == 1 else 'are'} not the pack's; move"
            f" {'it' if len(found) == 1 else 'them'} elsewhere (d2c-mlx push writes a README.md and"
            " a tasks.json again)"
        )


def list_pack(pack: Pack) -> list[dict[str, Any]]:
    """List the adapters of a pack, for people.

    Returns:
        For every adapter `adapter`, `tasks`, `merged` (number of adapters in it), `rank` and
        `nbytes` of its files or, in a compact pack, of its factors. Tasks that the base model
        serves come last, with the adapter None.
    """
    rows: list[dict[str, Any]] = []
    for key, tasks in pack.adapters.items():
        if isinstance(key, int):
            stored = read_compact(pack.path / COMPACT, key)
            ranks = [sum(level.rank for level in levels) for levels in stored.modules.values()]
            rank, nbytes = max(ranks, default=0), stored.nbytes
        elif pack.storage == "gguf":
            found = pack.load(tasks[0])
            rank, nbytes = found.rank if found else 0, pack.manifest.files[key].nbytes
        else:
            rank = load_adapter(pack.path / key).rank
            nbytes = sum(pack.files_of(key).values())
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
    left: dict[str, Any] = {t: key for t, key in pack.tasks.items() if t not in tasks}
    if not left:
        raise PackError(f"{pack.path}: no task would be left; delete the directory instead")
    kept = [key for key in pack.adapters if key in left.values()]
    merged: dict[Any, int] = {key: pack.merged(key) for key in kept}
    # The origin of a removed task is kept while its adapter may be in a merge. Which merge an
    # earlier one was in is not known; it is none once no adapter holds more than it serves.
    serving = Counter(left.values())
    orphans = any(n > serving[key] for key, n in merged.items())
    origins = {
        task: origin
        for task, origin in pack.origins.items()
        if task in left or (pack.tasks[task] in kept if task in pack.tasks else orphans)
    }
    info = replace(pack.info, merged=merged, origins=origins)
    if pack.storage == "plain":
        return rewrite_pack(pack, {}, left, info)
    place = {key: i for i, key in enumerate(kept)}
    serves = {task: None if key is None else place[key] for task, key in left.items()}
    if pack.storage == "gguf":
        merged = {f"cluster-{place[key]}.gguf": n for key, n in merged.items()}
        with tempfile.TemporaryDirectory() as temporary:
            files = [Path(temporary) / str(key) for key in kept]
            with pack.reading():
                for file in files:
                    pack.copy(file.name, file)
            return write_gguf_pack(pack.path, files, serves, replace(info, merged=merged))
    with pack.reading([COMPACT]):
        stored = [read_compact(pack.path / COMPACT, key) for key in kept if isinstance(key, int)]
    info = replace(info, merged={place[key]: n for key, n in merged.items()})
    return write_compact_pack(pack.path, stored, serves, info)
