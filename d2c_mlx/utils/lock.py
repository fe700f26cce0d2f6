"""Locks on directories, which the kernel releases when a process ends in any way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from d2c_mlx.utils.errors import D2CError

__all__ = ["held", "is_held", "locked"]

# Longest wait for a process that reads or replaces a directory.
_WAIT_SECONDS = 600
# A lock file holds the id of a process, and nothing else.
_OURS = re.compile(rb"\d{0,20}\n?")


@contextlib.contextmanager
def locked(
    directory: Path, wait: bool = False, advice: str = "wait for it or give another --output"
) -> Iterator[None]:
    """Lock a directory for long work while the block runs; it is created if need be.

    The lock file stays, because removing it would let two processes lock two files.

    Args:
        directory: the directory of a run, or of a cache.
        wait: wait until another process releases the lock.
        advice: end of the error message, for commands without --output.

    Raises:
        D2CError: another process holds the lock, and `wait` is False; the message names its id. Or
            its file is a link or not ours.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with os.fdopen(_open_lock(directory / ".lock"), "r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise D2CError(
                f"{directory}: process {file.read(20).strip() or '(unknown)'} is running here;"
                f" {advice}"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _open_lock(path: Path) -> int:
    """Open or make a lock file; somebody who sent the directory may have put a link in its place.

    Raises:
        D2CError: it is a link, a link of a file elsewhere, or holds anything but a process id.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
    else:
        about = os.fstat(handle)
        if stat.S_ISREG(about.st_mode) and about.st_nlink == 1 and about.st_size <= 21:
            if _OURS.fullmatch(os.pread(handle, 32, 0)):
                return handle
        os.close(handle)
    raise D2CError(
        f"{path}: is no lock file of d2c-mlx; look at what it is, and remove it if it is not needed"
    )


@contextlib.contextmanager
def held(directory: Path, shared: bool = False) -> Iterator[None]:
    """Lock a directory itself for short work while the block runs; no file is made.

    Several processes may hold it `shared`, to read what one that holds it alone would replace.
    Where there is no such directory, or no locks, nothing is locked.

    Raises:
        D2CError: others hold it for ten minutes.
    """
    handle = _open_directory(directory)
    try:
        if handle is not None:
            end = time.monotonic() + _WAIT_SECONDS
            while not _take(handle, shared):
                if time.monotonic() > end:
                    raise D2CError(
                        f"{directory}: another process has been at work here for"
                        f" {_WAIT_SECONDS} s; end it, then give this command again"
                    )
                time.sleep(0.02)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def is_held(directory: Path) -> bool:
    """True if a process holds this directory by `held`, or none can tell."""
    handle = _open_directory(directory)
    if handle is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _open_directory(directory: Path) -> int | None:
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None


def _take(handle: int, shared: bool) -> bool:
    """True if the lock is taken, or the file system has none."""
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
