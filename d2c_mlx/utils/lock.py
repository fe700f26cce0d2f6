"""One process at a time in a directory."""

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
    """Hold a directory while the block runs; it is made if it is not there.

    The kernel keeps the lock and lets go of it with the process, however that ends, so there is no
    stale one to take over. The file stays: removing it would let two processes lock two files.

    Args:
        directory: of a run, or of a cache.
        wait: until another process lets go of it.
        advice: to whom it is refused; not every command has an --output.

    Raises:
        D2CError: another process holds it, whose id the message names; not with `wait`.
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
