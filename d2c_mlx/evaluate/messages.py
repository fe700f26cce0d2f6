"""Messages between ranks: pieces as JSON and float32 numbers, over collectives of `mx.distributed`.

Collectives only: `mx.distributed` has no one-sided messages, so no rank can take work from another.
A message is a JSON header and an array of float32, which holds any 16-bit value exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.workers import Piece
from d2c_mlx.models.examples import Example, ExampleSet

__all__ = ["Group", "gather", "pack_pieces", "receive", "send", "unpack_pieces"]

Group = mx.distributed.Group


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
    body = b"" if floats is None else floats.tobytes()
    _sum(group, _split_lengths(len(text), len(body)))
    _sum(group, np.frombuffer(text + body, np.uint32))


def _split_lengths(*lengths: int) -> np.ndarray:
    """Lengths as two 32-bit words each, since a message may be longer than one word counts."""
    return np.array(lengths, np.uint64).view(np.uint32)


def _join_lengths(halves: np.ndarray) -> list[int]:
    return halves.view(np.uint64).tolist()


def receive(group: Group) -> tuple[dict[str, Any], np.ndarray]:
    """The message that rank 0 sends."""
    n_text, n_body = _join_lengths(_sum(group, np.zeros(4, np.uint32)))
    content = _sum(group, np.zeros((n_text + n_body) // 4, np.uint32)).tobytes()
    return json.loads(content[:n_text]), np.frombuffer(content[n_text:], np.float32)


def _sum(group: Group, x: np.ndarray) -> np.ndarray:
    return np.array(mx.distributed.all_sum(mx.array(x), group=group))


def gather(group: Group, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's answer, in order of rank; JSON keeps every bit of a float64."""
    text = json.dumps(answer).encode()
    length = mx.distributed.all_max(mx.array([len(text)], mx.uint32), group=group)
    padded = text.ljust(int(np.array(length)[0]))
    sent = mx.array(np.frombuffer(padded, np.uint8))[None]
    table = np.array(mx.distributed.all_gather(sent, group=group))
    return [json.loads(row.tobytes()) for row in table]
