"""Several machines, one run: rank 0 runs the pipeline, the others evaluate what it sends.

Under `mlx.launch -n 2 -- d2c-mlx run ...` every process runs the same command. Rank 0 alone reads
adapters and tasks and writes files; adapters, token ids and losses travel through
`mx.distributed` (ring on Ethernet, JACCL over Thunderbolt), so a worker needs nothing but the base
model. A loss has the same bits on any rank of the same kind of machine, hence the same pack.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from d2c_mlx.adapter import Adapter, LoRA
from d2c_mlx.engine import Engine, Savings
from d2c_mlx.errors import D2CError
from d2c_mlx.model import BaseModel
from d2c_mlx.schedule import LOT, Piece
from d2c_mlx.tasks import Example, ExampleSet

__all__ = ["Ranks", "launched", "leading", "local_ranks", "serve", "shares"]

T = TypeVar("T")
Group = mx.distributed.Group

# Set by mlx.launch for ring and JACCL, and by MPI.
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def launched() -> Group | None:
    """The group of all ranks, or None if this process runs alone."""
    if not any(name in os.environ for name in _LAUNCHED):
        return None
    group = mx.distributed.init()
    return group if group.size() > 1 else None


def local_ranks() -> int:
    """How many ranks of an `mlx.launch` run on this machine, which share its cores and memory."""
    path, rank = os.environ.get("MLX_HOSTFILE", ""), int(os.environ.get("MLX_RANK", 0))
    try:
        hosts = [addresses[0].rsplit(":", 1)[0] for addresses in json.loads(Path(path).read_text())]
        return max(1, hosts.count(hosts[rank]))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return 1  # not the ring backend


@contextmanager
def leading() -> Iterator[Group | None]:
    """On rank 0, around a run: in the end the workers are told to leave."""
    group = launched()
    try:
        yield group
    except D2CError:
        if group:
            _send(group, {"stop": True})
        raise
    if group:
        _send(group, {"stop": True})


class Ranks:
    """All ranks as one runner; only rank 0 has one."""

    def __init__(self, engine: Engine, group: Group) -> None:
        """Have every worker load the same base model.

        Raises:
            D2CError: a worker cannot, or has another model under that name.
        """
        self._engine, self._group = engine, group
        self._speed = np.ones(group.size())
        _send(group, {
            "model": engine.base.spec,
            "fingerprint": engine.base.fingerprint,
            "memory_limit": engine.memory_limit,
            "savings": dataclasses.asdict(engine.savings),
        })  # fmt: skip
        limits = self._gather([float(engine.batch_limit)])
        # Every rank cuts batches as the one with the least memory must: the cut decides bits.
        engine.batch_limit = int(min(limit for (limit,) in limits))
        _send(group, {"batch_limit": engine.batch_limit})

    def fingerprint(self, examples: ExampleSet) -> str:
        """As the engine's."""
        return self._engine.fingerprint(examples)

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, float]]:
        """As the engine's; in rounds, so that losses are stored long before the last is known."""
        tokens = [examples.n_tokens for _, examples in pieces]
        start = 0
        while start < len(pieces):
            stop, total = start, 0
            while stop < len(pieces) and total < LOT * self._group.size():
                total += tokens[stop]
                stop += 1
            cut = shares(tokens[start:stop], self._speed)
            _send(self._group, *_packed(pieces[start:stop], cut))
            try:
                row = _evaluate(self._engine, pieces[start:stop], cut[0])
            except D2CError:
                self._gather([], failed=True)
                raise
            for rank, (seconds, *sums) in enumerate(self._gather(row)):
                if cut[rank]:
                    self._speed[rank] = sum(tokens[start + i] for i in cut[rank]) / seconds
                yield from zip((start + i for i in cut[rank]), sums)
            start = stop

    def _gather(self, row: Sequence[float], failed: bool = False) -> list[list[float]]:
        rows = _gather(self._group, row, failed)
        bad = [str(rank) for rank, one in enumerate(rows) if one is None]
        if bad and not failed:
            raise D2CError(f"rank {', '.join(bad)} failed; its own message says why")
        return [one for one in rows if one is not None]


def serve(group: Group) -> None:
    """On a worker: load the base model that rank 0 names, evaluate what it sends, until the end.

    Raises:
        D2CError: the model cannot be loaded, or is not rank 0's; rank 0 is told.
    """
    hello, _ = _receive(group)
    if "stop" in hello:
        return
    engine = _checked(group, lambda: _engine(hello, group.rank()))
    _gather(group, [float(engine.batch_limit)])
    engine.batch_limit = _receive(group)[0]["batch_limit"]
    while True:
        header, floats = _receive(group)
        if "stop" in header:
            return
        pieces = _unpacked(header, floats)
        mine = header["shares"][group.rank()]
        _gather(group, _checked(group, partial(_evaluate, engine, pieces, mine)))


def _engine(hello: dict[str, Any], rank: int) -> Engine:
    base = BaseModel(hello["model"])
    if base.fingerprint != hello["fingerprint"]:
        raise D2CError(f"rank {rank}: {base.path} is not the base model that rank 0 has")
    return Engine(base, hello["memory_limit"], Savings(**hello["savings"]), local_ranks())


def _checked(group: Group, body: Callable[[], T]) -> T:
    """The result of `body`; its failure is rank 0's too."""
    try:
        return body()
    except D2CError:
        _gather(group, [], failed=True)
        raise


def _evaluate(engine: Engine, pieces: Sequence[Piece], mine: Sequence[int]) -> list[float]:
    """Seconds, then the NLL sums of the pieces at `mine`."""
    started = time.perf_counter()
    found = dict(engine.run([pieces[i] for i in mine]))
    return [time.perf_counter() - started, *(found[i] for i in range(len(mine)))]


def shares(tokens: Sequence[int], speed: np.ndarray) -> list[list[int]]:
    """Consecutive indices for every rank, as many tokens as its speed deserves."""
    ends = np.cumsum(tokens)
    middles = (ends - np.asarray(tokens) / 2) / ends[-1]
    ranks = np.searchsorted(np.cumsum(speed) / np.sum(speed), middles)
    return [np.flatnonzero(ranks == rank).tolist() for rank in range(len(speed))]


def _packed(pieces: Sequence[Piece], cut: list[list[int]]) -> tuple[dict[str, Any], np.ndarray]:
    """Pieces as a JSON header and all factors in float32, which holds any 16-bit value exactly."""
    adapters = {adapter.digest: adapter for adapter, _ in pieces if adapter}
    sets = {examples.digest: examples for _, examples in pieces}
    floats = [np.zeros(0, np.float32)]
    for adapter in adapters.values():
        for lora in adapter.modules.values():
            floats += [np.array(x.astype(mx.float32)).ravel() for x in (lora.a, lora.b)]
    header = {
        "shares": cut,
        "pieces": [
            (adapter and list(adapters).index(adapter.digest), list(sets).index(examples.digest))
            for adapter, examples in pieces
        ],
        "adapters": [
            {path: (*lora.shape, lora.rank, lora.scale) for path, lora in adapter.modules.items()}
            for adapter in adapters.values()
        ],
        "sets": [
            (one.task, [(row.tokens, row.offset) for row in one.examples]) for one in sets.values()
        ],
    }
    return header, np.concatenate(floats)


def _unpacked(header: dict[str, Any], floats: np.ndarray) -> list[Piece]:
    adapters, sets, start = [], [], 0
    for modules in header["adapters"]:
        loras = {}
        for path, (width, out, rank, scale) in modules.items():
            middle, stop = start + width * rank, start + (width + out) * rank
            a, b = floats[start:middle].reshape(width, rank), floats[middle:stop].reshape(rank, out)
            loras[path] = LoRA(mx.array(a), mx.array(b), scale)
            start = stop
        adapters.append(Adapter("", loras))
    for task, rows in header["sets"]:
        sets.append(ExampleSet(task, tuple(Example(tuple(t), offset) for t, offset in rows)))
    return [(None if i is None else adapters[i], sets[j]) for i, j in header["pieces"]]


def _send(group: Group, header: dict[str, Any], floats: np.ndarray | None = None) -> None:
    """From rank 0 to all: the others add zeros to its bits, which every backend can."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    body = b"" if floats is None else floats.tobytes()
    _sum(group, np.array([len(text), len(body)], np.uint32))
    _sum(group, np.frombuffer(text + body, np.uint32))


def _receive(group: Group) -> tuple[dict[str, Any], np.ndarray]:
    n_text, n_body = map(int, _sum(group, np.zeros(2, np.uint32)))
    content = _sum(group, np.zeros((n_text + n_body) // 4, np.uint32)).tobytes()
    return json.loads(content[:n_text]), np.frombuffer(content[n_text:], np.float32)


def _sum(group: Group, x: np.ndarray) -> np.ndarray:
    return np.array(mx.distributed.all_sum(mx.array(x), group=group))


def _gather(group: Group, row: Sequence[float], failed: bool = False) -> list[list[float] | None]:
    """Every rank's row, float64 bit by bit; None for a rank that failed."""
    length = np.array(mx.distributed.all_max(mx.array([len(row)], mx.uint32), group=group))
    padded = np.zeros(int(length[0]) + 2)
    padded[0], padded[1], padded[2 : 2 + len(row)] = failed, len(row), row
    bits = mx.array(padded.view(np.uint32))
    table = np.array(mx.distributed.all_gather(bits, group=group)).view(np.float64)
    rows = table.reshape(group.size(), -1)
    return [None if one[0] else one[2 : 2 + int(one[1])].tolist() for one in rows]
