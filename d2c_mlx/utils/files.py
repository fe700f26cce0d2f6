"""Atomic writes of files and directories, and hashes of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from d2c_mlx.utils.errors import ConfigError

__all__ = [
    "fingerprint",
    "hash_file",
    "hash_tree",
    "old_dir",
    "remove_dir",
    "restore_dir",
    "visible_files",
    "write_dir",
    "write_json",
    "write_text",
]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(source: Path, target: Path) -> None:
    """Rename within a directory, and flush that to the disk."""
    os.replace(source, target)
    _fsync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, by a temporary name, fsync and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        _rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401  JSON is any
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: `value` holds NaN or infinity, which JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _remove(path: Path) -> None:
    """Remove a file, a directory or a link, if it is there; a link's target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def write_dir(path: Path, ready: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Write a directory atomically, so that at any moment the old or the new one is whole.

    If `path` is a link, its target is replaced and the link stays. Use `write_text` for one file.

    Args:
        path: the directory to create or replace.
        ready: called with the complete new directory before it replaces `path`.

    Yields:
        An empty directory beside `path`. It replaces `path` after the block; after an error in the
        block it is removed.

    Raises:
        ConfigError: `path` exists and is no directory; nothing is changed.
    """
    path = Path(os.path.realpath(path))
    if not path.name or (path.exists() and not path.is_dir()):
        raise ConfigError(
            f"{path}: is no directory that can be replaced, expected one or a new name; name"
            " another, or move it away"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    old = old_dir(path)
    restore_dir(path)
    for stale in (temporary, old):
        _remove(stale)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        if ready:
            ready(temporary)
        if path.exists():
            os.replace(path, old)
        _rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        restore_dir(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def old_dir(path: Path) -> Path:
    """The path that `write_dir` and `remove_dir` move the old directory to until they are done."""
    return path.with_name(f".{path.name}.old")


def restore_dir(path: Path) -> None:
    """Move the old directory back if `write_dir` ended before the new one was in place."""
    old = old_dir(path)
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def remove_dir(path: Path) -> None:
    """Remove a directory, if there is one; at any moment it is whole or gone."""
    old = old_dir(path)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
        shutil.rmtree(old)


def hash_file(path: Path) -> str:
    """The hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def visible_files(directory: Path) -> list[Path]:
    """List all files below a directory except hidden ones, such as the .DS_Store of macOS."""
    return sorted(
        file for file in directory.rglob("*")
        if not file.is_dir()
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
    )  # fmt: skip


def hash_tree(path: Path) -> str:
    """The hex SHA-256 of a file, or of the names and contents of a directory's `visible_files`."""
    if path.is_file():
        return hash_file(path)
    files = [file for file in visible_files(path) if file.is_file()]
    return fingerprint([[file.relative_to(path).as_posix(), hash_file(file)] for file in files])


def fingerprint(value: Any) -> str:  # noqa: ANN401  JSON is any
    """The hex SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
