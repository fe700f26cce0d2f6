"""Locks on directories, which the kernel releases when a process ends in any way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from d2c_mlx.utils.errors import D2CError

__all__ = ["held", "is_held", "locked"]

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
            raise D2CError(
                f"{file}: is no lock file of d2c-mlx; look at what it is, and remove it if it is"
                " not needed"
            )
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
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            handle = os.open(directory, _DIRECTORY)
            stack.callback(os.close, handle)
            end = time.monotonic() + _WAIT_SECONDS
            while not _take(handle, kind):
                if time.monotonic() > end:
                    raise D2CError(
                        f"{directory}: another process has been at work here for"
                        f" {_WAIT_SECONDS} s; end it, then give this command again"
                    )
                time.sleep(0.02)
        yield


def _take(handle: int, kind: int) -> bool:
    """True if the lock is taken, or the file system has none."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


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
