"""The cache of losses: a file of losses by content, shared by all runs of this user."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from d2c_mlx.utils.errors import D2CError
from d2c_mlx.utils.files import held

__all__ = ["LossCache"]

_TABLE = (
    "CREATE TABLE IF NOT EXISTS losses (key TEXT PRIMARY KEY, loss REAL NOT NULL) WITHOUT ROWID"
)


class LossCache:
    """A table from key to loss in one SQLite file; several processes may use it at once.

    A key is a hash of all that decides a bit of the loss (`Engine.fingerprint` and the adapter), so
    an entry never becomes wrong, and the file can be deleted at any time.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Name the file, which is made with the first loss; None keeps losses in memory only."""
        self._path = path
        self._open: sqlite3.Connection | None = None

    def get(self, key: str) -> float | None:
        """The loss of a key, to the last bit, or None."""
        with self._connection() as connection:
            query = "SELECT loss FROM losses WHERE key = ?"
            row = connection.execute(query, (key,)).fetchone()
        return float(row[0]) if row else None

    def put(self, key: str, loss: float) -> None:
        """Store one loss; one that is there stays."""
        with self._connection() as connection:
            connection.execute("INSERT OR IGNORE INTO losses VALUES (?, ?)", (key, float(loss)))

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The open file; D2CError if it cannot be opened or written, or is not a database."""
        path = self._path
        try:
            if self._open is None:
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                opened = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
                # SQLite does not wait where two processes make a new file write-ahead.
                with held(path.parent) if path else nullcontext():
                    # Write-ahead: readers and one writer side by side; a kill loses nothing.
                    opened.execute("PRAGMA journal_mode=WAL")
                opened.execute("PRAGMA synchronous=NORMAL")
                opened.execute(_TABLE)
                self._open = opened
            yield self._open
        except (OSError, sqlite3.Error) as error:
            raise D2CError(
                f"{path}: cannot be used as the cache of losses ({error}); delete it, or name"
                " another directory in D2C_MLX_CACHE"
            ) from None
