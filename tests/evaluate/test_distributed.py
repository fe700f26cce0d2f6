"""Messages between ranks, and how ranks share pieces, in one process; test_ranks.py has several."""

import json

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from helpers.loras import lora_of

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate.distributed import (
    RankError,
    _exchange,
    _message,
    _pack,
    _round_end,
    _unpack,
    launched_group,
)
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.utils.environment import local_ranks


def test_a_rank_that_has_ended_gives_no_answer(monkeypatch):
    """The ring backend says so, or gives what was in memory before: nothing, or an old answer."""
    group, stored = mx.distributed.init(), []
    assert _exchange(group, b"text") == [b"text"]

    def answer(change):
        monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: change(x))

    answer(lambda x: stored.append(x) or x)
    _exchange(group, b"text")
    for left in (stored[0], mx.zeros_like(stored[0]), 255 * mx.ones_like(stored[0])):
        answer(lambda x, left=left: mx.concatenate([x, left]))
        with pytest.raises(RankError, match="^no answer of rank 1: a rank has ended"):
            _exchange(group, b"text")

    def lost(x):
        raise RuntimeError("[ring] connection to a peer was lost")

    answer(lost)
    with pytest.raises(RankError, match="a rank has ended.*lost.*the same command continues"):
        _exchange(group, b"text")


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_pieces_arrive_as_they_left(dtype):
    rng = np.random.default_rng(0)
    loras = {f"model.layers.{i}.q_proj": lora_of(rng, (6, 4), i + 1, 0.3 + i, dtype)
             for i in range(3)}  # fmt: skip
    targets = np.arange(15, dtype=np.float32).reshape(3, 5) / 7
    first = ExampleSet("a", (Example((1, 2, 3), 1), Example((4, 5), 0)))
    rows = Example((7, 8), 1), Example((7, 8, 9), 1)
    second = ExampleSet("b", rows, (), "t", (targets[:1], targets[1:]))
    pieces = [(None, first), (Adapter("x", loras), second), (Adapter("y", loras), first)]
    arrays = safetensors.numpy.load(_message(*_pack(pieces)))
    header = json.loads(arrays.pop("header").tobytes())
    assert len(header["adapters"]) == 1  # equal content travels once
    back = _unpack(header, arrays)
    assert [examples for _, examples in back] == [first, second, first]
    assert np.array_equal(np.concatenate(back[1][1].teacher_targets), targets)
    assert back[0][0] is None and back[1][0] is back[2][0]
    for path, lora in back[1][0].modules.items():
        a, b = loras[path].a.astype(mx.float32), loras[path].b.astype(mx.float32)
        assert lora.scale == 1
        assert mx.array_equal(lora.a, a) and mx.array_equal(lora.b, b * loras[path].scale)


def test_a_round_ends_before_its_adapters_are_too_large():
    """Adapters have 40 bytes each; an adapter that is in the round already costs nothing."""

    def adapter(value):
        return Adapter("", {"q": LoRA(mx.full((6, 1), value), mx.ones((1, 4)), 1.0)})

    row = ExampleSet("a", (Example((1, 2, 3), 1),))
    a, b, c = map(adapter, (1.0, 2.0, 3.0))
    pieces = [(one, row) for one in (a, None, a, b, a, c, c, b)]
    assert _round_end(pieces, 0, 2) == 8
    assert _round_end(pieces, 0, 2, most=80) == 5 and _round_end(pieces, 5, 2, most=80) == 8
    # One that is larger than a round may be is a round of its own.
    ends = [_round_end(pieces, start, 2, most=39) for start in range(8)]
    assert ends == [3, 3, 3, 4, 5, 7, 7, 8]


def test_alone_there_is_no_group(monkeypatch, tmp_path):
    assert launched_group() is None and local_ranks() == 1
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.1:5001"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    for rank, expected in enumerate((2, 1, 2)):
        monkeypatch.setenv("MLX_RANK", str(rank))
        assert local_ranks() == expected
