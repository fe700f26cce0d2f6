"""Several machines, one run: rank 0 runs the pipeline, the other ranks evaluate what it sends.

Under `mlx.launch -n 2 -- d2c-mlx run ...` every process runs the same command. Rank 0 alone reads
adapters and tasks and writes files; adapters, token ids and losses travel through `mx.distributed`
(ring on Ethernet, JACCL over Thunderbolt), so another rank reads no file but the base model's. A
loss has the same bits on any rank of the same kind of machine, hence the same pack.

In every message each rank gives bytes, and has those of all. After a rank has died the ring backend
may return what was in memory. Hence the checksums.
"""

import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import safetensors.numpy

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.engine import Engine
from d2c_mlx.evaluate.workers import CHUNK_TOKENS, Piece
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.utils.device import arithmetic
from d2c_mlx.utils.environment import RANK_VARIABLES, local_ranks
from d2c_mlx.utils.errors import D2CError

Group = mx.distributed.Group
Arrays = dict[str, np.ndarray]

# Numbers of messages: what was in memory before is no answer.
_MESSAGES = itertools.count()
# Most bytes of the adapters of a round: every rank holds a message as often as there are ranks.
_MAX_BYTES = 1 << 28
_AGAIN = "see what it said; the same command continues where it stopped"


class RankError(D2CError):
    """Another rank has died; no further message may be sent."""


def launched_group() -> Group | None:
    """The group of all ranks, or None if this process runs alone."""
    if not any(name in os.environ for name in RANK_VARIABLES):
        return None
    group = mx.distributed.init()
    return group if group.size() > 1 else None


@contextmanager
def leading_rank() -> Iterator[Group | None]:
    """Wrap a run on rank 0: when it ends, by an error too, the other ranks are told to leave.

    Yields:
        The group of all ranks, or None if this process runs alone.
    """
    group = launched_group()
    try:
        yield group
    except D2CError as error:
        if group and not isinstance(error, RankError):
            _exchange(group, _message({"stop": True}))
        raise
    if group:
        _exchange(group, _message({"stop": True}))


class Ranks:
    """All ranks in the place of an `Engine`, for rank 0."""

    def __init__(self, engine: Engine, group: Group) -> None:
        """Have every other rank load the base model of rank 0's `engine`.

        Raises:
            D2CError: a rank cannot load it, has another model under that name, or computes
                otherwise.
        """
        self._engine, self._group = engine, group
        hello = {
            "model": engine.base.spec,
            "fingerprint": engine.base.fingerprint,
            "arithmetic": arithmetic(),
            "memory_limit": engine.memory_limit,
            "limits": [engine.batch_limit, engine.fold],
        }
        self._ask(hello, lambda: [])

    def run(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, np.ndarray]]:
        """See `Engine.run`; in rounds, so that losses are stored long before the last is known."""
        start, size = 0, self._group.size()
        while start < len(pieces):
            stop = _round_end(pieces, start, size)
            sent = pieces[start:stop]
            header, arrays = _pack(sent)
            sums = self._ask(header, partial(_evaluate, self._engine, self._group, sent), arrays)
            yield from enumerate(map(np.array, itertools.chain(*sums)), start)
            start = stop

    def _ask(
        self, header: dict[str, Any], own: Callable[[], Any], arrays: Arrays | None = None
    ) -> list[Any]:
        """Send a request, do this rank's part of it, and return every rank's answer."""
        _exchange(self._group, _message(header, arrays))
        answers = _answers(self._group, own)
        errors = [f"rank {i}: {x['error']}" for i, x in enumerate(answers) if "error" in x]
        if errors:
            raise D2CError("\n".join(errors))
        return [answer["sums"] for answer in answers]


def run_worker(group: Group) -> None:
    """Be a rank other than 0: load the base model that rank 0 names, evaluate what it sends.

    Returns when rank 0 ends its run. An error goes to rank 0, which ends the run with it.
    """
    engines: list[Engine] = []

    def part(header: dict[str, Any], arrays: Arrays) -> list[list[float]]:
        if "model" not in header:
            return _evaluate(engines[0], group, _unpack(header, arrays))
        ours, theirs = arithmetic(), header["arithmetic"]
        different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if different:
            each = (f"{x}: found {ours.get(x)}, rank 0 has {theirs.get(x)}" for x in different)
            raise D2CError(f"{', '.join(each)}; losses would have other bits, so make them equal")
        base = Model(header["model"])
        if base.fingerprint != header["fingerprint"]:
            raise D2CError(f"{base.path} is not the base model that rank 0 has")
        engines[:] = [Engine(base, header["memory_limit"], local_ranks(), header["limits"])]
        return []

    while True:
        arrays = safetensors.numpy.load(_exchange(group, b"")[0])
        header = json.loads(arrays.pop("header").tobytes())
        if "stop" in header:
            return
        _answers(group, partial(part, header, arrays))


def _evaluate(engine: Engine, group: Group, pieces: Sequence[Piece]) -> list[list[float]]:
    """Losses of this rank's pieces: consecutive ones, about as many tokens for each rank."""
    tokens = [examples.n_tokens for _, examples in pieces]
    ends = np.cumsum(tokens)
    ranks = np.ceil((ends - np.array(tokens) / 2) / ends[-1] * group.size()) - 1
    share = [pieces[i] for i in np.flatnonzero(ranks == group.rank()).tolist()]
    sums = dict(engine.run(share))
    return [sums[i].tolist() for i in range(len(share))]


def _round_end(pieces: Sequence[Piece], start: int, size: int, most: int = _MAX_BYTES) -> int:
    """The index after a round that begins at `start`, of one piece or more, for `size` ranks."""
    total, nbytes, adapters = 0, 0, set[str]()
    for stop in range(start, len(pieces)):
        adapter, examples = pieces[stop]
        # A long set fills a round alone: a piece for every rank, too.
        if total >= CHUNK_TOKENS * size and stop - start >= size:
            return stop
        if adapter and adapter.digest not in adapters:
            nbytes += sum(4 * (lora.a.size + lora.b.size) for lora in adapter.modules.values())
            if adapters and nbytes > most:
                return stop
            adapters.add(adapter.digest)
        total += examples.n_tokens
    return len(pieces)


def _pack(pieces: Sequence[Piece]) -> tuple[dict[str, Any], Arrays]:
    """Pieces as a header and arrays, scales folded in; equal adapters and sets go once."""
    adapters = {adapter.digest: adapter for adapter, _ in pieces if adapter}
    sets = {examples.digest: examples for _, examples in pieces}
    arrays = {}
    for i, adapter in enumerate(adapters.values()):
        for path, lora in adapter.modules.items():
            arrays[f"a {i} {path}"], arrays[f"b {i} {path}"] = lora.factors()
    for i, examples in enumerate(sets.values()):
        arrays |= {f"{i} {j}": targets for j, targets in enumerate(examples.teacher_targets)}
    header = {
        "pieces": [
            (adapter and list(adapters).index(adapter.digest), list(sets).index(examples.digest))
            for adapter, examples in pieces
        ],
        "adapters": [list(adapter.modules) for adapter in adapters.values()],
        "sets": [
            (examples.task, examples.teacher, [(x.tokens, x.offset) for x in examples.examples])
            for examples in sets.values()
        ],
    }
    return header, arrays


def _unpack(header: dict[str, Any], arrays: Arrays) -> list[Piece]:
    """The pieces that `_pack` packed; adapters lose their names."""
    adapters, sets = [], []
    for i, paths in enumerate(header["adapters"]):
        factors = {path: [mx.array(arrays[f"{x} {i} {path}"]) for x in "ab"] for path in paths}
        adapters.append(Adapter("", {path: LoRA(a, b) for path, (a, b) in factors.items()}))
    for i, (task, teacher, rows) in enumerate(header["sets"]):
        examples = tuple(Example(tuple(tokens), offset) for tokens, offset in rows)
        targets = tuple(arrays[f"{i} {j}"] for j in range(len(rows))) if teacher else ()
        sets.append(ExampleSet(task, examples, teacher=teacher, teacher_targets=targets))
    return [(None if i is None else adapters[i], sets[j]) for i, j in header["pieces"]]


def _message(header: dict[str, Any], arrays: Arrays | None = None) -> bytes:
    # Safetensors writes transposed arrays in the order of their memory.
    tensors = {name: np.ascontiguousarray(x) for name, x in (arrays or {}).items()}
    tensors["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    return safetensors.numpy.save(tensors)


def _answers(group: Group, own: Callable[[], Any]) -> list[dict[str, Any]]:
    """Every rank's answer or error, in order of rank; JSON keeps every bit of a float64."""
    try:
        answer = {"sums": own()}
    except Exception as error:  # of a rank, in whose place rank 0 says it
        text = error if isinstance(error, D2CError) else f"{type(error).__name__} {error}"
        answer = {"error": " ".join(str(text).split())}
    return [json.loads(text) for text in _exchange(group, json.dumps(answer).encode())]


def _exchange(group: Group, content: bytes) -> list[bytes]:
    """Gather the values of all ranks, in their order; raises RankError if a rank has ended."""
    n = next(_MESSAGES)

    def gather(text: bytes) -> list[bytes]:
        """The texts of all ranks, of one length, each after its checksum."""
        sent = np.frombuffer(zlib.crc32(text, n).to_bytes(4, "little") + text, np.uint8)
        try:
            texts = np.array(mx.distributed.all_gather(mx.array(sent)[None], group=group))
        except RuntimeError as error:
            raise RankError(f"a rank has ended ({error}); {_AGAIN}") from None
        rows = [(row[:4].tobytes(), row[4:].tobytes()) for row in texts]
        seals = [zlib.crc32(row, n).to_bytes(4, "little") for _, row in rows]
        if gone := [str(i) for i, (seal, _) in enumerate(rows) if seal != seals[i]]:
            raise RankError(f"no answer of rank {', '.join(gone)}: a rank has ended; {_AGAIN}")
        return [row for _, row in rows]

    # Lengths are checked before there is memory for the contents.
    lengths = [int(length) for length in gather(b"%016d" % len(content))]
    return [text[:length] for text, length in zip(gather(content.ljust(max(lengths))), lengths)]
