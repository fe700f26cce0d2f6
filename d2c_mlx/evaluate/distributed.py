"""Several machines, one run: rank 0 runs the pipeline, the other ranks evaluate what it sends.

Under `mlx.launch -n 2 -- d2c-mlx run ...` every process runs the same command. Rank 0 alone reads
adapters and tasks and writes files; adapters, token ids and losses travel through `mx.distributed`
(ring on Ethernet, JACCL over Thunderbolt), so another rank reads no file but the base model's. A
loss has the same bits on any rank of the same kind of machine, hence the same pack.

A message is a JSON header and float32 arrays, which hold any 16-bit value exactly. There are
collectives only, so no rank can take work from another. After a rank has died the ring backend
raises an error, or nothing: it returns what was in memory, and hangs later. Hence the checksums.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np
import safetensors.numpy

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.workers import CHUNK_TOKENS, Piece
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.utils.device import arithmetic
from d2c_mlx.utils.environment import RANK_VARIABLES, local_ranks
from d2c_mlx.utils.errors import D2CError

__all__ = [
    "Group",
    "RankError",
    "Ranks",
    "launched_group",
    "leading_rank",
    "run_worker",
    "share_out",
]

Group = mx.distributed.Group
Arrays = dict[str, np.ndarray]

# Numbers of messages: what was in memory before is no answer.
_MESSAGES = itertools.count()
# Most bytes of the adapters of a round: all of a message is in memory, several times for a moment.
_MAX_BYTES = 1 << 30
_AGAIN = "the same command continues where it stopped"


class RankError(D2CError):
    """Another rank has died; no further message may be sent."""


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
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def end() -> None:
        while (number := os.read(reader, 1))[0] != signal.SIGTERM:
            if before >= 0:
                os.write(before, number)
        text = f"error: rank {rank} was ended, as mlx.launch does when another rank has failed;"
        os.write(2, f"{text} {_AGAIN}\n".encode())
        os._exit(1)

    before = signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Python resets handlers while it exits, but for ignored signals: the exit code is ours then.
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end, daemon=True).start()


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
            _send(group, {"stop": True})
        raise
    if group:
        _send(group, {"stop": True})


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
        self._speed = np.full(group.size(), np.nan)  # tokens per second; NaN is not measured
        hello = {
            "model": engine.base.spec,
            "fingerprint": engine.base.fingerprint,
            "arithmetic": arithmetic(),
            "memory_limit": engine.memory_limit,
        }
        plans = self._ask(hello, lambda: [engine.batch_limit, engine.fold])
        # Every rank evaluates as the one with the least memory must: the plan decides bits.
        plan = [min(column) for column in zip(*plans)]
        engine.follow(*plan)
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
            shares = share_out(tokens[start:stop], self._speed)
            header, arrays = _pack_pieces(pieces[start:stop], shares)
            own = partial(_evaluate, self._engine, pieces[start:stop], shares[0])
            rows = self._ask(header, own, arrays)
            work = [sum(tokens[start + i] for i in share) for share in shares]
            self._speed = _next_speed(self._speed, work, [row[0] for row in rows])
            for share, (_, *sums) in zip(shares, rows):
                yield from zip((start + i for i in share), sums)
            start = stop

    def _ask(
        self, header: dict[str, Any], own: Callable[[], list[float]], arrays: Arrays | None = None
    ) -> list[list[float]]:
        """Send a request, do this rank's part of it, and return every rank's numbers."""
        n = next(_MESSAGES)
        _send(self._group, {**header, "n": n}, arrays)
        answers = _gather(self._group, _answer(own), n)
        errors = [f"rank {i}: {x['error']}" for i, x in enumerate(answers) if "error" in x]
        if errors:
            raise D2CError("\n".join(errors))
        return [answer["row"] for answer in answers]


def run_worker(group: Group) -> None:
    """Be a rank other than 0: load the base model that rank 0 names, evaluate what it sends.

    Returns when rank 0 ends its run. An error goes to rank 0, which ends the run with it.
    """
    engines: list[Engine] = []

    def part(header: dict[str, Any], arrays: Arrays) -> list[float]:
        if "model" in header:
            engines.append(_same_engine(header))
            return [engines[0].batch_limit, engines[0].fold]
        if "plan" in header:
            engines[0].follow(*header["plan"])
            return []
        return _evaluate(engines[0], _unpack_pieces(header, arrays), header["shares"][group.rank()])

    while True:
        header, arrays = _receive(group)
        if "stop" in header:
            return
        _gather(group, _answer(partial(part, header, arrays)), header["n"])


def _answer(part: Callable[[], list[float]]) -> dict[str, Any]:
    try:
        return {"row": part()}
    except Exception as error:  # of a rank, in whose place rank 0 says it
        text = error if isinstance(error, D2CError) else f"{type(error).__name__} {error}"
        return {"error": " ".join(str(text).split())}


def _same_engine(hello: dict[str, Any]) -> Engine:
    """An engine whose losses have the bits of rank 0's."""
    ours, theirs = arithmetic(), hello["arithmetic"]
    different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
    if different:
        each = (f"{x}: found {ours.get(x)}, rank 0 has {theirs.get(x)}" for x in different)
        raise D2CError(f"{', '.join(each)}; losses would have other bits, so make them equal")
    base = BaseModel(hello["model"])
    if base.fingerprint != hello["fingerprint"]:
        raise D2CError(f"{base.path} is not the base model that rank 0 has")
    return Engine(base, hello["memory_limit"], local_ranks())


def _evaluate(engine: Engine, pieces: Sequence[Piece], share: Sequence[int]) -> list[float]:
    """Seconds, then the NLL sums of the pieces at `share`."""
    started = time.perf_counter()
    sums = dict(engine.run([pieces[i] for i in share]))
    return [time.perf_counter() - started, *(sums[i] for i in range(len(share)))]


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


def _next_speed(speed: np.ndarray, work: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """Speeds to share work by, after a round in which each rank did `work` tokens in `seconds`.

    A rank that had no work gets a little more each time: where pieces are few, even the least share
    may be no whole piece, and one slow round would leave the rank idle for ever. One that never had
    any counts as the mean of the others.
    """
    done = np.asarray(work) > 0
    if not done.any():
        return speed
    measured = np.where(done, work / np.maximum(seconds, 1e-9), speed)
    grown = np.where(np.isnan(speed), measured[done].mean(), speed + measured[done].max() / 200)
    speed = np.where(done, measured, grown)
    return np.maximum(speed, speed.max() / 10)


def share_out(tokens: Sequence[int], speed: np.ndarray) -> list[list[int]]:
    """Share pieces out: consecutive indices for every rank, its tokens in proportion to its speed.

    Args:
        tokens: of every piece.
        speed: of every rank, in any unit; all alike where none is measured.
    """
    speed = np.ones(len(speed)) if np.isnan(speed).all() else speed
    ends = np.cumsum(tokens)
    middles = (ends - np.asarray(tokens) / 2) / ends[-1]
    ranks = np.searchsorted(np.cumsum(speed) / np.sum(speed), middles)
    return [np.flatnonzero(ranks == rank).tolist() for rank in range(len(speed))]


def _pack_pieces(pieces: Sequence[Piece], shares: list[list[int]]) -> tuple[dict[str, Any], Arrays]:
    """Pieces, and the share of each rank, as a header and arrays; equal ones go once."""
    adapters = {adapter.digest: adapter for adapter, _ in pieces if adapter}
    sets = {examples.digest: examples for _, examples in pieces}
    arrays = {}
    for i, adapter in enumerate(adapters.values()):
        for path, lora in adapter.modules.items():
            arrays[f"a {i} {path}"] = np.array(lora.a.astype(mx.float32))
            arrays[f"b {i} {path}"] = np.array(lora.b.astype(mx.float32))
    for i, examples in enumerate(sets.values()):
        arrays |= {f"{i} {j}": targets for j, targets in enumerate(examples.teacher_targets)}
    header = {
        "shares": shares,
        "pieces": [
            (adapter and list(adapters).index(adapter.digest), list(sets).index(examples.digest))
            for adapter, examples in pieces
        ],
        "adapters": [
            {path: lora.scale for path, lora in adapter.modules.items()}
            for adapter in adapters.values()
        ],
        "sets": [
            (examples.task, examples.teacher, [(x.tokens, x.offset) for x in examples.examples])
            for examples in sets.values()
        ],
    }
    return header, arrays


def _unpack_pieces(header: dict[str, Any], arrays: Arrays) -> list[Piece]:
    """The pieces that `_pack_pieces` packed; adapters lose their names."""
    adapters, sets = [], []
    for i, scales in enumerate(header["adapters"]):
        factors = {
            path: (mx.array(arrays[f"a {i} {path}"]), mx.array(arrays[f"b {i} {path}"]))
            for path in scales
        }
        adapters.append(Adapter("", {p: LoRA(*factors[p], scales[p]) for p in scales}))
    for i, (task, teacher, rows) in enumerate(header["sets"]):
        examples = tuple(Example(tuple(tokens), offset) for tokens, offset in rows)
        targets = tuple(arrays[f"{i} {j}"] for j in range(len(rows))) if teacher else ()
        sets.append(ExampleSet(task, examples, teacher=teacher, teacher_targets=targets))
    return [(None if i is None else adapters[i], sets[j]) for i, j in header["pieces"]]


def _send(group: Group, header: dict[str, Any], arrays: Arrays | None = None) -> None:
    """Send a message from rank 0 to all others, which receive it meanwhile.

    The others add zeros to its bits: a sum of unsigned integers is exact on every backend.
    """
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    # Transposed arrays would be written in the order of their memory.
    tensors = {name: np.ascontiguousarray(x) for name, x in (arrays or {}).items()}
    tensors["header"] = np.frombuffer(text, np.uint8)
    content = safetensors.numpy.save(tensors)
    # Two 32-bit words, since a message may be longer than one word counts.
    length = np.array([len(content)], np.uint64).view(np.uint32)
    sums = [zlib.crc32(length.tobytes()), zlib.crc32(content)]
    _sum(group, np.append(length, np.array(sums, np.uint32)))
    _sum(group, np.frombuffer(content, np.uint32))


def _receive(group: Group) -> tuple[dict[str, Any], Arrays]:
    """The message that rank 0 sends; raises RankError if it did not arrive."""
    head = _sum(group, np.zeros(4, np.uint32))
    if zlib.crc32(head[:2].tobytes()) != head[2]:
        raise RankError("no message from rank 0 arrived: a rank has ended, see what it said")
    (nbytes,) = head[:2].view(np.uint64).tolist()
    content = _sum(group, np.zeros(nbytes // 4, np.uint32)).tobytes()
    if zlib.crc32(content) != head[3]:
        raise RankError("half a message of rank 0 arrived: a rank has ended, see what it said")
    arrays = safetensors.numpy.load(content)
    return json.loads(arrays.pop("header").tobytes()), arrays


def _sum(group: Group, x: np.ndarray) -> np.ndarray:
    return _arrived(lambda: mx.distributed.all_sum(mx.array(x), group=group))


def _arrived(ask: Callable[[], mx.array]) -> np.ndarray:
    """The result of a collective; raises RankError where the backend notices a lost rank."""
    try:
        return np.array(ask())
    except RuntimeError as error:
        raise RankError(f"a rank has ended, see what it said ({error}); {_AGAIN}") from None


def _gather(group: Group, answer: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Every rank's answer to message `n`, in order of rank; JSON keeps every bit of a float64.

    Raises:
        RankError: a rank did not answer.
    """

    def seal(text: bytes) -> bytes:
        """Four bytes by which a text about this message is told from what was in memory before."""
        return zlib.crc32(text, n).to_bytes(4, "little")

    def from_all(text: bytes) -> list[bytes]:
        """The texts of all ranks, of one length."""
        sent = mx.array(np.frombuffer(seal(text) + text, np.uint8))[None]
        texts = _arrived(lambda: mx.distributed.all_gather(sent, group=group))
        rows = [row.tobytes() for row in texts]
        gone = [str(i) for i, row in enumerate(rows) if row[:4] != seal(row[4:])]
        if gone:
            raise RankError(
                f"no answer of rank {', '.join(gone)}: a rank has ended, see what it said; {_AGAIN}"
            )
        return [row[4:] for row in rows]

    text = json.dumps(answer).encode()
    # A length is checked before there is memory for it.
    longest = max(map(int, from_all(b"%016d" % len(text))))
    return [json.loads(row) for row in from_all(text.ljust(longest))]
