"""Messages between ranks arrive whole; where one does not, the error names the lost rank."""

import mlx.core as mx
import numpy as np
import pytest

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate import distributed
from d2c_mlx.evaluate.distributed import (
    RankError,
    _gather,
    _pack_pieces,
    _send,
    _unpack_pieces,
)
from d2c_mlx.models.examples import Example, ExampleSet


@pytest.mark.parametrize("name", ["all_sum", "all_gather"])
def test_a_lost_connection_is_told_as_a_rank_that_has_ended(monkeypatch, name):
    """As the ring backend says it where it notices before `mlx.launch` ends the others."""
    group = mx.distributed.init()

    def lost(x, group):
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr(mx.distributed, name, lost)
    with pytest.raises(RankError, match="a rank has ended.*lost.*the same command continues"):
        _send(group, {"n": 1}) if name == "all_sum" else _gather(group, {"row": []}, 1)


def test_what_was_in_memory_before_is_no_answer(monkeypatch):
    """As the ring backend gives it for a rank that has ended: nothing, or an earlier answer."""
    group, stored = mx.distributed.init(), []
    assert _gather(group, {"row": [0.1]}, 3) == [{"row": [0.1]}]
    monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: stored.append(x) or x)
    _gather(group, {"row": [0.1]}, 4)
    for left in (stored[0], mx.zeros_like(stored[0]), 255 * mx.ones_like(stored[0])):
        monkeypatch.setattr(
            mx.distributed, "all_gather", lambda x, group, left=left: mx.concatenate([x, left])
        )
        with pytest.raises(RankError, match="^no answer of rank 1: a rank has ended"):
            _gather(group, {"row": [0.1]}, 5)


def test_a_message_may_have_more_than_four_gigabytes():
    group = mx.distributed.init()
    sent = mx.array(np.array([5_000_000_000], np.uint64).view(np.uint32))
    received = np.array(mx.distributed.all_sum(sent, group=group))
    assert received.view(np.uint64).tolist() == [5_000_000_000]


def sent_and_received(header, arrays, monkeypatch):
    """A message through collectives of which rank 0's arrays are kept, and given to a receiver."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "_sum", lambda group, x: kept.append(x))
        _send(None, header, arrays)
        patch.setattr(distributed, "_sum", lambda group, x: kept.pop(0))
        return distributed._receive(None)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_pieces_arrive_as_they_left(dtype, monkeypatch):
    mx.random.seed(0)
    loras = {
        f"model.layers.{i}.q_proj": LoRA(
            mx.random.normal((i + 1, 6)).astype(dtype).T,
            mx.random.normal((i + 1, 4)).astype(dtype),
            0.3 + i,
        )
        for i in range(3)
    }  # fmt: skip
    sets = [ExampleSet(name, (Example((1, 2, 3), 1), Example((4, 5), 0))) for name in "ab"]
    said = np.arange(15, dtype=np.float32).reshape(3, 5) / 7
    sets[1] = ExampleSet(
        "b", (Example((7, 8), 1), Example((7, 8, 9), 1)), (), "t", (said[:1], said[1:])
    )
    pieces = [(None, sets[0]), (Adapter("x", loras), sets[1]), (Adapter("y", loras), sets[0])]
    header, arrays = _pack_pieces(pieces, [[0], [1, 2]])
    header, arrays = sent_and_received(header, arrays, monkeypatch)
    assert len(header["adapters"]) == 1  # equal content travels once
    back = _unpack_pieces(header, arrays)
    assert [one for _, one in back] == [sets[0], sets[1], sets[0]]
    assert [x.tolist() for x in back[1][1].teacher_targets] == [
        said[:1].tolist(),
        said[1:].tolist(),
    ]
    assert back[0][0] is None and back[1][0] is back[2][0]
    for path, lora in back[1][0].modules.items():
        for got, sent in ((lora.a, loras[path].a), (lora.b, loras[path].b)):
            assert mx.array_equal(got, sent.astype(mx.float32))
        assert lora.scale == loras[path].scale
