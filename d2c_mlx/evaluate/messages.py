"""Messages between ranks: pieces as JSON and float32 numbers, over collectives of `mx.distributed`.

Collectives only: `mx.distributed` has no one-sided messages, so no rank can take work from another.
A message is a JSON header and an array of float32, which holds any 16-bit value exactly. After a
rank has died the ring backend raises an error, or nothing: it returns what was in memory, and hangs
later. Hence the checksums.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.workers import Piece
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.utils.errors import D2CError

__all__ = ["Group", "RankError", "gather", "pack_pieces", "receive", "send", "unpack_pieces"]

Group = mx.distributed.Group
_AGAIN = "the same command continues where it stopped"


class RankError(D2CError):
    """Another rank has died; no further message may be sent."""


def pack_pieces(pieces: Sequence[Piece], cut: list[list[int]]) -> tuple[dict[str, Any], np.ndarray]:
    """Pieces as a message; each adapter and each set goes once.

    Args:
        pieces: pairs of an adapter (None: the bare base model) and an example set.
        cut: indices of the pieces that each rank evaluates.

    Returns:
        The header, and all factors and teacher targets.
    """
    adapters = {adapter.digest: adapter for adapter, _ in pieces if adapter}
    sets = {examples.digest: examples for _, examples in pieces}
    floats = [np.zeros(0, np.float32)]
    for adapter in adapters.values():
        for lora in adapter.modules.values():
            floats += [np.array(x.astype(mx.float32)).ravel() for x in (lora.a, lora.b)]
    for one in sets.values():
        floats += [expected.ravel() for expected in one.teacher_targets]
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
                [expected.shape for expected in one.teacher_targets],
            )
            for one in sets.values()
        ],  # fmt: skip
    }
    return header, np.concatenate(floats)


def unpack_pieces(header: dict[str, Any], floats: np.ndarray) -> list[Piece]:
    """The pieces that `pack_pieces` packed; adapters lose their names."""
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
        sets.append(ExampleSet(task, examples, teacher=teacher, teacher_targets=tuple(expected)))
    return [(None if i is None else adapters[i], sets[j]) for i, j in header["pieces"]]


def send(group: Group, header: dict[str, Any], floats: np.ndarray | None = None) -> None:
    """Send a message from rank 0 to all others, which call `receive` meanwhile.

    The others add zeros to its bits: a sum of unsigned integers is exact on every backend.
    """
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    content = text + (b"" if floats is None else floats.tobytes())
    lengths = _split_lengths(len(text), len(content))
    sums = [zlib.crc32(lengths.tobytes()), zlib.crc32(content)]
    _sum(group, np.append(lengths, np.array(sums, np.uint32)))
    _sum(group, np.frombuffer(content, np.uint32))


def _split_lengths(*lengths: int) -> np.ndarray:
    """Lengths as two 32-bit words each, since a message may be longer than one word counts."""
    return np.array(lengths, np.uint64).view(np.uint32)


def _join_lengths(halves: np.ndarray) -> list[int]:
    return halves.view(np.uint64).tolist()


def receive(group: Group) -> tuple[dict[str, Any], np.ndarray]:
    """The message that rank 0 sends.

    Raises:
        RankError: it did not arrive.
    """
    head = _sum(group, np.zeros(6, np.uint32))
    if zlib.crc32(head[:4].tobytes()) != head[4]:
        raise RankError("no message from rank 0 arrived: a rank has ended, see what it said")
    n_text, n_bytes = _join_lengths(head[:4])
    content = _sum(group, np.zeros(n_bytes // 4, np.uint32)).tobytes()
    if zlib.crc32(content) != head[5]:
        raise RankError("half a message of rank 0 arrived: a rank has ended, see what it said")
    return json.loads(content[:n_text]), np.frombuffer(content[n_text:], np.float32)


def _sum(group: Group, x: np.ndarray) -> np.ndarray:
    return _arrived(lambda: mx.distributed.all_sum(mx.array(x), group=group))


def _arrived(ask: Callable[[], mx.array]) -> np.ndarray:
    """The result of a collective; raises RankError where the backend notices a lost rank."""
    try:
        return np.array(ask())
    except RuntimeError as error:
        raise RankError(f"a rank has ended, see what it said ({error}); {_AGAIN}") from None


def gather(group: Group, answer: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Every rank's answer to message `n`, in order of rank; JSON keeps every bit of a float64.

    Raises:
        RankError: a rank did not answer.
    """
    text = json.dumps(answer).encode()
    # A length is checked before there is memory for it.
    longest = max(int(one) for one in _all_rows(group, b"%016d" % len(text), n))
    return [json.loads(one) for one in _all_rows(group, text.ljust(longest), n)]


def _all_rows(group: Group, text: bytes, n: int) -> list[bytes]:
    """The texts of all ranks, of one length, about message `n`."""
    sent = mx.array(np.frombuffer(_seal(text, n) + text, np.uint8))[None]
    found = _arrived(lambda: mx.distributed.all_gather(sent, group=group))
    rows = [row.tobytes() for row in found]
    gone = [str(i) for i, row in enumerate(rows) if row[:4] != _seal(row[4:], n)]
    if gone:
        raise RankError(
            f"no answer of rank {', '.join(gone)}: a rank has ended, see what it said; {_AGAIN}"
        )
    return [row[4:] for row in rows]


def _seal(text: bytes, n: int) -> bytes:
    """Four bytes by which a text about message `n` is told from what was in memory before."""
    return zlib.crc32(text, n).to_bytes(4, "little")
