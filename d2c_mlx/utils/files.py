"""Atomic writes of files and directories, locks, reads of regular files only, and hashes.

The kernel releases a lock when its process ends in any way.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from d2c_mlx.utils.errors import ConfigError, D2CError

# Most bytes of a text file that is read as a whole; no manifest, config or table comes near it.
_MOST_TEXT = 64 << 20
# Longest wait for a process that reads or replaces a directory.
_WAIT_SECONDS = 600
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def locked(
    directory: Path, wait: bool = False, advice: str = "wait for it or give another --output"
) -> Iterator[None]:
    """Lock a directory for long work while the block runs; it is created if need be.

    The lock file `.lock` stays, because removing it would let two processes lock two files.

    Args:
        directory: the directory of a run, or of a cache.
        wait: wait until another process releases the lock.
        advice: end of the error message, for commands without --output.

    Raises:
        D2CError: another process holds the lock, and `wait` is False; or its file is not ours.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / ".lock"
    # Opening it may empty it, and somebody who sent the directory may have put a link in its place.
    if os.path.lexists(file):
        about = file.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1 or about.st_size:
            raise D2CError(f"{file}: is no lock file of d2c-mlx; look at it, and remove it")
    lock = FileLock(file, timeout=-1 if wait else 0, mode=0o666)
    try:
        lock.acquire()
    except Timeout:
        raise D2CError(f"{directory}: another process is running here; {advice}") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def held(directory: Path, shared: bool = False) -> Iterator[None]:
    """Lock a directory itself for short work while the block runs; no file is made.

    Several processes may hold it `shared`, to read what one that holds it alone would replace.
    Where there is no such directory, or no locks, nothing is locked.

    Raises:
        D2CError: others hold it for ten minutes.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    end = time.monotonic() + _WAIT_SECONDS
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            handle = os.open(directory, _DIRECTORY)
            stack.callback(os.close, handle)
            while True:
                try:
                    fcntl.flock(handle, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise D2CError(
                            f"{directory}: another process has been at work here for"
                            f" {_WAIT_SECONDS} s; end it, then give this command again"
                        ) from None
                    time.sleep(0.02)
                    continue
                except OSError:  # a file system without locks
                    pass
                break
        yield


def is_held(directory: Path) -> bool:
    """True if a process holds this directory by `held`, or none can tell."""
    try:
        handle = os.open(directory, _DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def open_file(path: Path) -> BufferedReader:
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
    restore_dir(path)
    with contextlib.ExitStack() as stack:
        with held(path.parent):
            remove_stale(path.parent, re.escape(path.name))
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
                    _remove(old_dir(path))
                    if path.exists():
                        os.replace(path, old_dir(path))
                    _rename(temporary, path)
                    shutil.rmtree(old_dir(path), ignore_errors=True)
        except BaseException:
            restore_dir(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_stale(directory: Path, name: str = ".+") -> None:
    """Remove what killed processes left in a directory that is locked, of names by a pattern."""
    stale = re.compile(rf"\.{name}\.[0-9a-f]{{8}}\.tmp")
    for path in directory.glob(".*.tmp"):
        if stale.fullmatch(path.name) and not is_held(path):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file, a directory or a link, if it is there; a link's target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def old_dir(path: Path) -> Path:
    """The path that `write_dir` and `remove_dir` move the old directory to until they are done."""
    return path.with_name(f".{path.name}.old")


def restore_dir(path: Path) -> None:
    """Move the old directory back if `write_dir` was killed before the new one was in place."""
    path = Path(os.path.realpath(path))
    old = old_dir(path)
    if not path.exists() and old.is_dir() and not old.is_symlink():
        # Another process may be first.
        with held(path.parent), contextlib.suppress(FileNotFoundError):
            if not path.exists():
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
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    files = (path for path in directory.rglob("*") if not path.is_dir())
    hidden = re.compile(r"(?s)(.*/)?\.")
    return sorted(path for path in files if not hidden.match(str(path.relative_to(directory))))


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
