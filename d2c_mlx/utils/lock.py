"""A lock on a directory, for one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from d2c_mlx.utils.errors import D2CError

__all__ = ["locked"]


@contextlib.contextmanager
def locked(
    directory: Path, wait: bool = False, advice: str = "wait for it or give another --output"
) -> Iterator[None]:
    """Lock a directory while the block runs; it is created if need be.

    The kernel keeps the lock and releases it when the process ends in any way, so no lock is ever
    stale. The lock file stays, because removing it would let two processes lock two files.

    Args:
        directory: the directory of a run, or of a cache.
        wait: wait until another process releases the lock.
        advice: end of the error message, for commands without --output.

    Raises:
        D2CError: another process holds the lock, and `wait` is False; the message names its id.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            raise D2CError(
                f"{directory}: process {file.read().strip() or '(unknown)'} is running here;"
                f" {advice}"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
