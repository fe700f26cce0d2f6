"""Atomic writes of files and directories, reads of regular files only, and hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.lock import held, is_held

__all__ = [
    "copy_file",
    "file_state",
    "fingerprint",
    "hash_file",
    "hash_tree",
    "old_dir",
    "open_file",
    "read_text",
    "remove_dir",
    "restore_dir",
    "visible_files",
    "write_dir",
    "write_json",
    "write_text",
]

# Most bytes of a text file that is read as a whole; no manifest, config or table comes near it.
_MOST_TEXT = 64 << 20


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


def _beside(path: Path) -> Path:
    """A temporary name beside a path that no other process uses or can guess."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def open_file(path: Path) -> BinaryIO:
    """Open a file to read its bytes; a named pipe or a device would never end.

    Raises:
        OSError: there is none, or it is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_text(path: Path, most: int = _MOST_TEXT) -> str:
    """Read a UTF-8 file of at most `most` bytes, without the byte order mark that Windows writes.

    Raises:
        OSError: as `open_file`, or it is larger.
        UnicodeDecodeError: it is not UTF-8.
    """
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"more than {most:,} bytes", str(path))
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, by a temporary name, fsync and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        # "x": a link under this name is not followed.
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
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
def write_dir(path: Path, ready: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """Write a directory atomically, so that at any moment the old or the new one is whole.

    If `path` is a link, its target is replaced and the link stays. Use `write_text` for one file.
    Of two processes that write one directory each writes its own; the last one stays.

    Args:
        path: the directory to create or replace.
        ready: called with the complete new directory before it replaces `path`; nothing else
            replaces `path` meanwhile.

    Yields:
        An empty directory beside `path`. It replaces `path` after the block; after an error in the
        block it is removed.

    Raises:
        ConfigError: `path` exists and is no directory; nothing is changed.
        D2CError: another process reads or writes it, and does not end.
    """
    path = Path(os.path.realpath(path))
    if not path.name or (path.exists() and not path.is_dir()):
        raise ConfigError(
            f"{path}: is no directory that can be replaced, expected one or a new name; name"
            " another, or move it away"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    with contextlib.ExitStack() as stack:
        with held(path.parent):
            _restore(path)
            _remove_stale(path)
            temporary.mkdir()
            # Until it is in place, others see by this that it is not stale.
            stack.enter_context(held(temporary, shared=True))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _fsync(file)
            _fsync(temporary)
            with held(path.parent):
                if ready:
                    ready(temporary)
                # Those who read the old one come to their end first.
                with held(path):
                    _replace(path, temporary)
        except BaseException:
            restore_dir(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace(path: Path, temporary: Path) -> None:
    old = old_dir(path)
    _remove(old)
    if path.exists():
        os.replace(path, old)
    _rename(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(path: Path) -> None:
    """Remove temporary directories of processes that were killed while they wrote `path`."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for sibling in path.parent.iterdir():
        if ours.fullmatch(sibling.name) and (sibling.is_symlink() or not is_held(sibling)):
            _remove(sibling)


def old_dir(path: Path) -> Path:
    """The path that `write_dir` and `remove_dir` move the old directory to until they are done."""
    return path.with_name(f".{path.name}.old")


def restore_dir(path: Path) -> None:
    """Move the old directory back if `write_dir` was killed before the new one was in place."""
    path = Path(os.path.realpath(path))
    if not path.exists() and old_dir(path).is_dir():
        with held(path.parent):
            _restore(path)


def _restore(path: Path) -> None:
    old = old_dir(path)
    if old.is_dir() and not old.is_symlink() and not path.exists():
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
    with open_file(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def copy_file(source: Path, target: Path) -> str:
    """Copy a file to a new name; returns the hex SHA-256 of the bytes that were written."""
    digest = hashlib.sha256()
    with open_file(source) as read, open(target, "xb") as write:
        while chunk := read.read(1 << 20):
            digest.update(chunk)
            write.write(chunk)
    return digest.hexdigest()


def file_state(path: Path) -> tuple[int, ...]:
    """Device, inode, size and times in ns: equal while nobody replaces or writes the file.

    The time of the last change of the inode is among them, which no program can set back.
    """
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


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
