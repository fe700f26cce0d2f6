"""Several machines, one run: rank 0 runs the pipeline, the others evaluate what it sends.

Under `mlx.launch -n 2 -- d2c-mlx run ...` every process runs the same command. Rank 0 alone reads
adapters and tasks and writes files; adapters, token ids and losses travel through
`mx.distributed` (ring on Ethernet, JACCL over Thunderbolt), so a worker needs nothing but the base
model. A loss has the same bits on any rank of the same kind of machine, hence the same pack.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.engine import Engine, Savings
from d2c_mlx.evaluate.workers import LOT, Piece
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.utils.environment import RANK_VARIABLES
from d2c_mlx.utils.errors import D2CError

__all__ = ["Ranks", "launched", "leading", "local_ranks", "serve", "shares"]

Group = mx.distributed.Group
# Bytes of the adapters of a round: all of a message is in memory, several times for a moment.
_MOST_BYTES = 1 << 30


def launched() -> Group | None:
    """The group of all ranks, or None if this process runs alone."""
    if not any(name in os.environ for name in RANK_VARIABLES):
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
        self._speed = np.full(group.size(), np.nan)  # tokens per second, NaN: not measured
        hello = {
            "model": engine.base.spec,
            "fingerprint": engine.base.fingerprint,
            "memory_limit": engine.memory_limit,
            "savings": dataclasses.asdict(engine.savings),
        }
        plans = self._ask(hello, lambda: _plan(engine))
        # Every rank evaluates as the one with the least memory must: the plan decides bits.
        plan = [min(column) for column in zip(*plans)]
        _follow(engine, plan)
        self._ask({"plan": plan}, lambda: [])

    def fingerprint(self, examples: ExampleSet) -> str:
        """As the engine's."""
        return self._engine.fingerprint(examples)

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, float]]:
        """As the engine's; in rounds, so that losses are stored long before the last is known."""
        tokens = [examples.n_tokens for _, examples in pieces]
        start, size = 0, self._group.size()
        while start < len(pieces):
            stop = _end(pieces, start, size)
            cut = shares(tokens[start:stop], _weights(self._speed))
            some = pieces[start:stop]
            header, floats = _packed(some, cut)
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
        _send(self._group, header, floats)
        answers = _gather(self._group, _answer(mine))
        errors = [f"rank {i}: {one['error']}" for i, one in enumerate(answers) if "error" in one]
        if errors:
            raise D2CError("\n".join(errors))
        return [one["row"] for one in answers]


def serve(group: Group) -> None:
    """On a worker: load the base model that rank 0 names, evaluate what it sends, until the end.

    An error is told to rank 0, which ends the run with it.
    """
    engines: list[Engine] = []

    def part(header: dict[str, Any], floats: np.ndarray) -> list[float]:
        if "model" in header:
            engines.append(_engine(header))
            return _plan(engines[0])
        if "plan" in header:
            _follow(engines[0], header["plan"])
            return []
        return _evaluate(engines[0], _unpacked(header, floats), header["shares"][group.rank()])

    while True:
        header, floats = _receive(group)
        if "stop" in header:
            return
        _gather(group, _answer(partial(part, header, floats)))


def _end(pieces: Sequence[Piece], start: int, size: int, most: int = _MOST_BYTES) -> int:
    """Where a round for so many ranks ends that begins at `start`: after one piece or more."""
    stop, total, nbytes, sent = start, 0, 0, set()
    # A long set fills a round alone: a piece for every rank, too.
    while stop < len(pieces) and (total < LOT * size or stop - start < size):
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


def _engine(hello: dict[str, Any]) -> Engine:
    base = BaseModel(hello["model"])
    if base.fingerprint != hello["fingerprint"]:
        raise D2CError(f"{base.path} is not the base model that rank 0 has")
    return Engine(base, hello["memory_limit"], Savings(**hello["savings"]), local_ranks())


def _plan(engine: Engine) -> list[float]:
    """What a rank's memory allows."""
    return [engine.batch_limit, engine.fold]


def _follow(engine: Engine, plan: Sequence[float]) -> None:
    engine.batch_limit, engine.fold = int(plan[0]), bool(plan[1])


def _evaluate(engine: Engine, pieces: Sequence[Piece], mine: Sequence[int]) -> list[float]:
    """Seconds, then the NLL sums of the pieces at `mine`."""
    started = time.perf_counter()
    found = dict(engine.run([pieces[i] for i in mine]))
    return [time.perf_counter() - started, *(found[i] for i in range(len(mine)))]


def _measured(speed: np.ndarray, work: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """Speeds after a round of so many tokens per rank.

    That of an idle rank grows a little: where pieces are few, even the least share may be no whole
    piece, and one slow round would leave it idle for ever.
    """
    done = np.asarray(work)
    found = np.where(done > 0, done / np.maximum(seconds, 1e-9), speed)
    return np.where(done > 0, found, found + np.nanmax(found) / 200)


def _weights(speed: np.ndarray) -> np.ndarray:
    """Speeds to share by, none NaN: a rank that is never given work is never measured again."""
    unknown = np.isnan(speed)
    if unknown.all():
        return np.ones(len(speed))
    filled = np.where(unknown, speed[~unknown].mean(), speed)
    return np.maximum(filled, filled.max() / 10)


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
    for one in sets.values():
        floats += [expected.ravel() for expected in one.expected]
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
            (
                one.task,
                one.teacher,
                [(row.tokens, row.offset) for row in one.examples],
                [expected.shape for expected in one.expected],
            )
            for one in sets.values()
        ],  # fmt: skip
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
    for task, teacher, rows, shapes in header["sets"]:
        examples, expected = tuple(Example(tuple(t), offset) for t, offset in rows), []
        for shape in shapes:
            stop = start + math.prod(shape)
            expected.append(floats[start:stop].reshape(shape))
            start = stop
        sets.append(ExampleSet(task, examples, teacher=teacher, expected=tuple(expected)))
    return [(None if i is None else adapters[i], sets[j]) for i, j in header["pieces"]]


def _send(group: Group, header: dict[str, Any], floats: np.ndarray | None = None) -> None:
    """From rank 0 to all: the others add zeros to its bits, which every backend can."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    body = b"" if floats is None else floats.tobytes()
    _sum(group, _halves(len(text), len(body)))
    _sum(group, np.frombuffer(text + body, np.uint32))


def _halves(*lengths: int) -> np.ndarray:
    """Each in two words, as a message may be longer than one counts."""
    return np.array(lengths, np.uint64).view(np.uint32)


def _lengths(halves: np.ndarray) -> list[int]:
    return halves.view(np.uint64).tolist()


def _receive(group: Group) -> tuple[dict[str, Any], np.ndarray]:
    n_text, n_body = _lengths(_sum(group, np.zeros(4, np.uint32)))
    content = _sum(group, np.zeros((n_text + n_body) // 4, np.uint32)).tobytes()
    return json.loads(content[:n_text]), np.frombuffer(content[n_text:], np.float32)


def _sum(group: Group, x: np.ndarray) -> np.ndarray:
    return np.array(mx.distributed.all_sum(mx.array(x), group=group))


def _gather(group: Group, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's answer, as JSON, which keeps every bit of a float64."""
    text = json.dumps(answer).encode()
    length = mx.distributed.all_max(mx.array([len(text)], mx.uint32), group=group)
    padded = text.ljust(int(np.array(length)[0]))
    sent = mx.array(np.frombuffer(padded, np.uint8))[None]
    table = np.array(mx.distributed.all_gather(sent, group=group))
    return [json.loads(row.tobytes()) for row in table]
