"""Several machines, one run: rank 0 runs the pipeline, the other ranks evaluate what it sends.

Under `mlx.launch -n 2 -- d2c-mlx run ...` every process runs the same command. Rank 0 alone reads
adapters and tasks and writes files; adapters, token ids and losses travel through `mx.distributed`
(ring on Ethernet, JACCL over Thunderbolt), so another rank reads no file but the base model's. A
loss has the same bits on any rank of the same kind of machine, hence the same pack.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.messages import (
    Group,
    RankError,
    gather,
    pack_pieces,
    receive,
    send,
    unpack_pieces,
)
from d2c_mlx.evaluate.workers import CHUNK_TOKENS, Piece
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.utils.device import arithmetic
from d2c_mlx.utils.environment import RANK_VARIABLES
from d2c_mlx.utils.errors import D2CError

__all__ = ["Ranks", "launched_group", "leading_rank", "local_ranks", "run_worker", "share_out"]

# Numbers of messages: what was in memory before is no answer.
_MESSAGES = itertools.count()
# Most bytes of the adapters of a round: all of a message is in memory, several times for a moment.
_MAX_BYTES = 1 << 30


def launched_group() -> Group | None:
    """The group of all ranks, or None if this process runs alone."""
    if not any(name in os.environ for name in RANK_VARIABLES):
        return None
    group = mx.distributed.init()
    if group.size() == 1:
        return None
    _watch(group.rank())
    return group


@cache
def _watch(rank: int) -> None:
    """End with a line and 1 when `mlx.launch` ends this process, as it does after a rank that died.

    A thread does: the main one may wait for that rank in a collective, where no signal is handled.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)

    def end() -> None:
        while (one := os.read(heard, 1))[0] != signal.SIGTERM:
            if before >= 0:
                os.write(before, one)
        text = f"error: rank {rank} was ended, as mlx.launch does when another rank has failed; the"
        os.write(2, f"{text} same command continues where it stopped\n".encode())
        os._exit(1)

    before = signal.set_wakeup_fd(told)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Python resets handlers while it exits, but for ignored signals: the exit code is ours then.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()


def local_ranks() -> int:
    """Number of ranks of an `mlx.launch` on this machine, which share its cores and memory."""
    path, rank = os.environ.get("MLX_HOSTFILE", ""), int(os.environ.get("MLX_RANK", 0))
    try:
        hosts = [addresses[0].rsplit(":", 1)[0] for addresses in json.loads(Path(path).read_text())]
        return max(1, hosts.count(hosts[rank]))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return 1  # not the ring backend


@contextmanager
def leading_rank() -> Iterator[Group | None]:
    """Wrap a run on rank 0: when it ends, by an error too, the other ranks are told to leave.

    Yields:
        The group of all ranks, or None if this process runs alone.
    """
    group = launched_group()
    try:
        yield group
    except RankError:
        # This process says itself why it ends, and ends: `_watch` would say it again.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    except D2CError:
        if group:
            send(group, {"stop": True})
        raise
    if group:
        send(group, {"stop": True})


class Ranks:
    """All ranks as one runner, for rank 0; a single process uses its `Engine` as the runner.

    Shares follow each rank's measured speed.
    """

    def __init__(self, engine: Engine, group: Group) -> None:
        """Have every other rank load the same base model.

        Args:
            engine: rank 0's own.
            group: all ranks.

        Raises:
            D2CError: a rank cannot load it, has another model under that name, or computes
                otherwise.
        """
        self._engine, self._group = engine, group
        self._speed = np.full(group.size(), np.nan)  # tokens per second, NaN: not measured
        hello = {
            "model": engine.base.spec,
            "fingerprint": engine.base.fingerprint,
            "arithmetic": arithmetic(),
            "memory_limit": engine.memory_limit,
        }
        plans = self._ask(hello, lambda: _plan(engine))
        # Every rank evaluates as the one with the least memory must: the plan decides bits.
        plan = [min(column) for column in zip(*plans)]
        _follow(engine, plan)
        self._ask({"plan": plan}, lambda: [])

    def fingerprint(self, examples: ExampleSet) -> str:
        """See `Engine.fingerprint`."""
        return self._engine.fingerprint(examples)

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, float]]:
        """See `Engine.run`; in rounds, so that losses are stored long before the last is known."""
        tokens = [examples.n_tokens for _, examples in pieces]
        start, size = 0, self._group.size()
        while start < len(pieces):
            stop = _end(pieces, start, size)
            cut = share_out(tokens[start:stop], _weights(self._speed))
            some = pieces[start:stop]
            header, floats = pack_pieces(some, cut)
            rows = self._ask(header, partial(_evaluate, self._engine, some, cut[0]), floats)
            work = [sum(tokens[start + i] for i in mine) for mine in cut]
            self._speed = _measured(self._speed, work, [row[0] for row in rows])
            for mine, (_, *sums) in zip(cut, rows):
                yield from zip((start + i for i in mine), sums)
            start = stop

    def _ask(
        self,
        header: dict[str, Any],
        mine: Callable[[], list[float]],
        floats: np.ndarray | None = None,
    ) -> list[list[float]]:
        """Send a request, do this rank's part of it, and return every rank's numbers."""
        n = next(_MESSAGES)
        send(self._group, {**header, "n": n}, floats)
        answers = gather(self._group, _answer(mine), n)
        errors = [f"rank {i}: {one['error']}" for i, one in enumerate(answers) if "error" in one]
        if errors:
            raise D2CError("\n".join(errors))
        return [one["row"] for one in answers]


def run_worker(group: Group) -> None:
    """Be a rank other than 0: load the base model that rank 0 names, evaluate what it sends.

    Returns when rank 0 ends its run. An error goes to rank 0, which ends the run with it.
    """
    engines: list[Engine] = []

    def part(header: dict[str, Any], floats: np.ndarray) -> list[float]:
        if "model" in header:
            engines.append(_engine(header))
            return _plan(engines[0])
        if "plan" in header:
            _follow(engines[0], header["plan"])
            return []
        return _evaluate(engines[0], unpack_pieces(header, floats), header["shares"][group.rank()])

    while True:
        header, floats = receive(group)
        if "stop" in header:
            return
        gather(group, _answer(partial(part, header, floats)), header["n"])


def _end(pieces: Sequence[Piece], start: int, size: int, most: int = _MAX_BYTES) -> int:
    """The index after a round that begins at `start`, of one piece or more, for `size` ranks."""
    stop, total, nbytes, sent = start, 0, 0, set()
    # A long set fills a round alone: a piece for every rank, too.
    while stop < len(pieces) and (total < CHUNK_TOKENS * size or stop - start < size):
        adapter, examples = pieces[stop]
        if adapter and adapter.digest not in sent:
            sent.add(adapter.digest)
            nbytes += sum(4 * (x.a.size + x.b.size) for x in adapter.modules.values())
            if nbytes > most and stop > start:
                break
        total += examples.n_tokens
        stop += 1
    return stop


def _answer(part: Callable[[], list[float]]) -> dict[str, Any]:
    try:
        return {"row": part()}
    except D2CError as error:
        return {"error": str(error)}
    except Exception as error:  # of a rank, in whose place rank 0 says it
        return {"error": " ".join(f"{type(error).__name__} {error}".split())}


def _engine(hello: dict[str, Any]) -> Engine:
    ours, theirs = arithmetic(), hello["arithmetic"]
    different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if different:
        said = (f"{x}: found {ours.get(x)}, rank 0 has {theirs.get(x)}" for x in different)
        raise D2CError(f"{', '.join(said)}; losses would have other bits, so make them equal")
    base = BaseModel(hello["model"])
    if base.fingerprint != hello["fingerprint"]:
        raise D2CError(f"{base.path} is not the base model that rank 0 has")
    return Engine(base, hello["memory_limit"], local_ranks())


def _plan(engine: Engine) -> list[float]:
    """Limits of this rank's memory: bytes of a batch, and whether adapters are folded."""
    return [engine.batch_limit, engine.fold]


def _follow(engine: Engine, plan: Sequence[float]) -> None:
    engine.batch_limit, engine.fold = int(plan[0]), bool(plan[1])


def _evaluate(engine: Engine, pieces: Sequence[Piece], mine: Sequence[int]) -> list[float]:
    """Seconds, then the NLL sums of the pieces at `mine`."""
    started = time.perf_counter()
    found = dict(engine.run([pieces[i] for i in mine]))
    return [time.perf_counter() - started, *(found[i] for i in range(len(mine)))]


def _measured(speed: np.ndarray, work: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """Speeds in tokens per second after a round, `work` in tokens of every rank.

    An idle rank's speed grows a little: where pieces are few, even the least share may be no whole
    piece, and one slow round would leave the rank idle for ever.
    """
    done = np.asarray(work)
    found = np.where(done > 0, done / np.maximum(seconds, 1e-9), speed)
    return np.where(done > 0, found, found + np.nanmax(found) / 200)


def _weights(speed: np.ndarray) -> np.ndarray:
    """Speeds to share work by, none NaN or near 0: an idle rank would never be measured again."""
    unknown = np.isnan(speed)
    if unknown.all():
        return np.ones(len(speed))
    filled = np.where(unknown, speed[~unknown].mean(), speed)
    return np.maximum(filled, filled.max() / 10)


def share_out(tokens: Sequence[int], speed: np.ndarray) -> list[list[int]]:
    """Share pieces out: consecutive indices for every rank, its tokens in proportion to its speed.

    Args:
        tokens: of every piece.
        speed: of every rank, in any unit.
    """
    ends = np.cumsum(tokens)
    middles = (ends - np.asarray(tokens) / 2) / ends[-1]
    ranks = np.searchsorted(np.cumsum(speed) / np.sum(speed), middles)
    return [np.flatnonzero(ranks == rank).tolist() for rank in range(len(speed))]
