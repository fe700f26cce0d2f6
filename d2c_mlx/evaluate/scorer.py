"""Losses of many adapters on many tasks, each evaluated only once, and the regrets they give."""

import hashlib
import sqlite3
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Self

import numpy as np

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.distributed import Group, Ranks
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.errors import AdapterError, D2CError, ModelError
from d2c_mlx.utils.files import fingerprint, held
from d2c_mlx.utils.progress import Progress

# In nats. A smaller gain counts as this much where losses are divided by it.
LEAST_GAIN = 0.05
# A lower regret counts as this much.
_LEAST_REGRET = -1.0
_COLUMNS = ("tasks", "individual", "base", "strengths", "weakened")
_TABLE = "CREATE TABLE rows (key TEXT PRIMARY KEY, sums BLOB NOT NULL) WITHOUT ROWID"
_GET = "SELECT CAST(sums AS BLOB) FROM rows WHERE key = ?"
# The hash before the sums of an entry, of its key and sums.
_SEAL = 16
_seal = partial(hashlib.blake2b, digest_size=_SEAL)

Job = tuple[Adapter | None, Sequence[ExampleSet]]


class LossCache:
    """A table from key to losses of rows in one SQLite file, which several processes may use.

    A key is a hash of all that decides a bit of a loss (`Engine.fingerprint` and the adapter), so
    an entry never becomes wrong, and the file can be deleted at any time. SQLite does not notice
    damage to what it holds, so an entry begins with a hash of its key and sums.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Name the file, which is made with the first loss; None keeps losses in memory only."""
        self._path = path
        self._open: sqlite3.Connection | None = None

    def get(self, key: str) -> np.ndarray | None:
        """`(n_rows,)` sums of a key, to the last bit, or None."""
        with self._connection() as connection:
            row = connection.execute(_GET, (key,)).fetchone()
        entry = row[0] if row else b""
        seal, sums = entry[:_SEAL], entry[_SEAL:]
        return np.frombuffer(sums) if seal == _seal(key.encode() + sums).digest() else None

    def put(self, key: str, sums: np.ndarray) -> None:
        """Store the float64 sums of a key."""
        with self._connection() as connection:
            entry = _seal(key.encode() + sums.tobytes()).digest() + sums.tobytes()
            connection.execute("REPLACE INTO rows VALUES (?, ?)", (key, entry))

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The open file; D2CError if it cannot be opened or written, or is not a database."""
        path = self._path
        try:
            if self._open is None:
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                opened = sqlite3.connect(
                    path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False
                )
                weakref.finalize(self, opened.close)  # in any thread
                # SQLite does not wait where two processes make a new file write-ahead.
                with held(path.parent) if path else nullcontext():
                    # Write-ahead: readers and one writer side by side; a kill loses nothing.
                    opened.execute("PRAGMA journal_mode=WAL")
                opened.execute("PRAGMA synchronous=NORMAL")
                opened.execute(_TABLE.replace("TABLE", "TABLE IF NOT EXISTS"))
                if [*opened.execute("SELECT sql FROM sqlite_master")] != [(_TABLE,)]:
                    raise sqlite3.DatabaseError("it holds other tables, views or triggers")
                self._open = opened
            yield self._open
        except (OSError, ValueError, sqlite3.Error) as error:
            raise D2CError(
                f"{path}: cannot be used as the cache of losses ({error}); delete it, or name"
                " another directory in D2C_MLX_CACHE"
            ) from None


class Scorer:
    """Losses on a base model, each evaluated once and cached by content.

    A cache key is the hash of engine, base model, adapter content and token ids. So two equal
    merges share a loss, whatever their names. The loss is that of mlx-lm's trainer, `default_loss`,
    on the targets of its dataset classes. Source: https://github.com/ml-explore/mlx-lm.

    Attributes:
        engine: runs the base model here.
        progress: shows how far the work is.
        counts: since the scorer was made, evaluations `asked` for, those `done`, which the cache
            did not know, and their `tokens`.
    """

    def __init__(
        self,
        engine: Engine,
        cache: LossCache | None = None,
        progress: Progress | None = None,
        group: Group | None = None,
    ) -> None:
        """Make a scorer.

        Args:
            engine: runs the base model here.
            cache: keeps losses; None keeps those of this scorer alone.
            progress: shows how far the work is; None shows nothing.
            group: ranks that share the work and load the base model now; None is this process.
        """
        self.engine, self.progress = engine, progress or Progress()
        self.counts = Counter(asked=0, done=0, tokens=0)
        self._cache, self._runner = cache or LossCache(), Ranks(engine, group) if group else engine

    def losses(self, jobs: Sequence[Job], in_parts: bool = False) -> list[np.ndarray]:
        """Evaluate every job; cached losses cost nothing.

        Args:
            jobs: pairs of an adapter (None for the bare base model) and its example sets.
            in_parts: evaluate the parts of a set side by side. Use it where few sets would leave
                cores idle.

        Returns:
            `(n_sets,)` mean NLL per target token per job, in nats.

        Raises:
            AdapterError: a loss under an adapter is not finite.
            ModelError: a loss under the base model is not finite.
        """
        sums = self.row_losses(jobs, in_parts)
        return [
            np.array([rows.sum() / examples.n_targets for rows, examples in zip(by_set, sets)])
            for by_set, (_, sets) in zip(sums, jobs)
        ]

    def row_losses(self, jobs: Sequence[Job], in_parts: bool = False) -> list[list[np.ndarray]]:
        """As `losses`, for every set `(n_rows,)` sums of the NLL over each row's targets."""

        def parts_of(examples: ExampleSet) -> Sequence[ExampleSet]:
            return examples.parts if in_parts else (examples,)

        pieces = [(x, part) for x, sets in jobs for examples in sets for part in parts_of(examples)]
        abouts = [[self.engine.fingerprint(y), x.digest if x else "base"] for x, y in pieces]
        keys = [fingerprint(about)[:32] for about in abouts]
        cached = {key: self._cache.get(key) for key in keys}
        rows = {key: sums for key, sums in cached.items() if sums is not None}
        missing = {key: piece for key, piece in zip(keys, pieces) if key not in rows}
        names, todo = list(missing), list(missing.values())
        self.progress.expect(sum(part.n_tokens for _, part in todo))
        for i, sums in self._runner.run(todo):
            rows[names[i]], n_tokens = sums, todo[i][1].n_tokens
            if np.isfinite(sums).all():
                self._cache.put(names[i], sums)
            self.counts["tokens"] += n_tokens
            self.progress.advance(n_tokens)
        self.counts.update(asked=len(pieces), done=len(todo))
        # Only now, because other ranks wait until all is done.
        for name, (adapter, part) in missing.items():
            if np.isfinite(rows[name]).all():
                continue
            why = f"the loss on task {part.task!r} is {rows[name].sum()}"
            if adapter is None:
                raise ModelError(
                    f"the base model: {why}; its weights are damaged, or its numbers overflow"
                )
            raise AdapterError(
                f"{adapter.name}: {why}: numbers overflow with it; leave it out, or train it again"
            )
        in_order = (rows[key] for key in keys)
        return [[np.concatenate([next(in_order) for _ in parts_of(x)]) for x in s] for _, s in jobs]


@dataclass(frozen=True)
class LossTable:
    """Mean NLL per target token, in nats, on the calibration rows; `measure_losses` makes one.

    Attributes:
        tasks: task names.
        individual: `(n_tasks,)` losses of each task under its task adapter.
        base: `(n_tasks,)` losses under the bare base model.
        strengths: `(s,)` factors on dW at which task adapters were measured, rising; may be empty.
        weakened: `(n_tasks, s)` losses of each task under its task adapter at these strengths.
    """

    tasks: tuple[str, ...]
    individual: np.ndarray
    base: np.ndarray
    strengths: tuple[float, ...] = ()
    weakened: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @cached_property
    def gain(self) -> np.ndarray:
        """`(n_tasks,)` nats that each task adapter gains over the base model, at least 0.05."""
        return np.maximum(self.base - self.individual, LEAST_GAIN)

    def regret(self, losses: np.ndarray, tasks: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Bring losses to a scale that tasks share: 0 at the task adapter, 1 at the base model.

        A gain counts as at least 0.05 nats, so that an adapter that hardly helps does not outvote
        the others. A regret is at least -1: an adapter worse than the base model would outvote them
        too, since any merge that undoes it is many such gains better.

        Args:
            losses: `(n,)` or `(n, k)`, in nats per target token.
            tasks: `(n,)` indices of the tasks of the rows.

        Returns:
            Regrets in the shape of `losses`, without a unit.
        """
        wide = (slice(None),) + (None,) * (losses.ndim - 1)
        regrets = (losses - self.individual[tasks][wide]) / self.gain[tasks][wide]
        return np.maximum(regrets, _LEAST_REGRET)

    def to_json(self) -> dict[str, object]:
        """The content of `losses.json`."""
        columns = {name: np.asarray(getattr(self, name)).tolist() for name in _COLUMNS}
        return {"unit": "mean NLL per target token (nats)", **columns}

    @classmethod
    def from_json(cls, data: dict[str, list]) -> Self:
        """Make a table from the content that `to_json` gave."""
        tasks, *columns = (data[name] for name in _COLUMNS)
        individual, base, strengths, weakened = (np.array(numbers, float) for numbers in columns)
        by_task = weakened.reshape(len(tasks), -1)
        return cls(tuple(tasks), individual, base, tuple(strengths.tolist()), by_task)
