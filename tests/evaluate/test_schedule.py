"""What is evaluated together and in which order: rows in batches, sets in threads, what is kept."""

import json
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from helpers.loras import lora_of

from d2c_mlx.adapters.adapter import Adapter, LoRA
from d2c_mlx.evaluate import distributed
from d2c_mlx.evaluate.batches import shared_prefix, split_rows
from d2c_mlx.evaluate.distributed import RankError
from d2c_mlx.evaluate.workers import ByteCache, Workers
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.utils.environment import local_ranks


def test_rows_are_cut_where_padding_would_cost_more():
    def cost(rows, width, n_prefix):
        return rows * (width + n_prefix)

    assert split_rows([50, 10, 50, 10], 0, cost, 1 << 30) == [[1, 3], [0, 2]]
    assert split_rows([12, 10, 11, 10], 0, cost, 1 << 30) == [[1, 3, 2, 0]]
    assert split_rows([10] * 4, 0, cost, cost(2, 10, 0)) == [[0, 1], [2, 3]]
    assert split_rows([10, 11], 0, cost, cost(1, 10, 0)) is None
    assert max(map(len, split_rows([100] * 50, 0, cost, 1 << 40))) == 20


def test_the_shared_prefix_ends_before_the_first_predicting_position():
    def rows(*pairs):
        return ExampleSet("a", tuple(Example(tuple(tokens), offset) for tokens, offset in pairs))

    same = range(10)
    assert shared_prefix(rows((same, 8), (same, 6))) == tuple(range(5))
    assert shared_prefix(rows(([*range(6), 9, 9], 7), (range(8), 7))) == tuple(range(6))
    assert shared_prefix(rows(([0, 1, 2, 9], 3), (range(4), 3))) == ()
    assert shared_prefix(rows((same, 8))) == ()


def test_what_is_kept_stays_within_its_bytes():
    kept = ByteCache(100)

    def there():
        return "".join(key for key in "abcdx" if kept.get(key))

    for key in "abc":
        kept.put(key, key, 40)
    assert there() == "bc"
    kept.put("x", "huge", 104)
    assert there() == "bc"
    kept.put("c", "larger", 60)
    assert there() == "bc" and kept.get("c") == "larger"
    kept.put("d", "d", 40)
    assert there() == "cd"


def test_workers_take_the_largest_first_and_stop_when_no_one_listens():
    sets, chunks = [SimpleNamespace(n_tokens=n) for n in (4000, 4000, 10, 9000, 1)], []
    done = list(Workers(1).run(lambda chunk: chunks.append(len(chunk)) or chunk, sets))
    # A thread alone takes chunks in order.
    assert chunks == [2, 2, 1] and done == list(enumerate(sets))
    order = []
    body = lambda chunk: order.append(chunk[0]) or chunk  # noqa: E731
    assert sorted(Workers(2).run(body, sets), key=lambda x: x[0]) == list(enumerate(sets))
    assert order[0] is sets[3]
    pytest.raises(ZeroDivisionError, next, Workers(2).run(lambda chunk: [1 / 0], sets))


@pytest.mark.slow
def test_a_process_whose_threads_evaluated_ends_well():
    """MLX aborts at exit if a thread has left its stream: two processes in three did."""
    code = """
import d2c_mlx
import mlx.core as mx
from types import SimpleNamespace
from d2c_mlx.evaluate.workers import Workers
def evaluate(chunk):
    x = mx.ones((50, 50))
    mx.eval(x @ x)
    return [len(chunk)]
for _ in range(2):  # the first pool is dropped while its threads wait
    workers = Workers(2)
    assert len(list(workers.run(evaluate, [SimpleNamespace(n_tokens=i) for i in range(9)]))) == 9
"""
    argv = [sys.executable, "-c", code]
    several = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in several:
        _, err = process.communicate()
        assert process.returncode == 0, err


# Messages between ranks, and how ranks share pieces; test_ranks.py has several processes


def test_a_rank_that_has_ended_gives_no_answer(monkeypatch):
    """The ring backend says so, or gives what was in memory before: nothing, or an old answer."""
    group, stored = mx.distributed.init(), []
    assert distributed._exchange(group, b"text") == [b"text"]

    def answer(change):
        monkeypatch.setattr(mx.distributed, "all_gather", lambda x, group: change(x))

    answer(lambda x: stored.append(x) or x)
    distributed._exchange(group, b"text")
    for left in (stored[0], mx.zeros_like(stored[0]), 255 * mx.ones_like(stored[0])):
        answer(lambda x, left=left: mx.concatenate([x, left]))
        with pytest.raises(RankError, match="^no answer of rank 1: a rank has ended"):
            distributed._exchange(group, b"text")

    def lost(x):
        raise RuntimeError("[ring] connection to a peer was lost")

    answer(lost)
    with pytest.raises(RankError, match="a rank has ended.*lost.*the same command continues"):
        distributed._exchange(group, b"text")


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
    arrays = safetensors.numpy.load(distributed._message(*distributed._pack(pieces)))
    header = json.loads(arrays.pop("header").tobytes())
    assert len(header["adapters"]) == 1  # equal content travels once
    back = distributed._unpack(header, arrays)
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
    pieces = [(adapter, row) for adapter in (a, None, a, b, a, c, c, b)]
    assert distributed._round_end(pieces, 0, 2) == 8
    assert [distributed._round_end(pieces, start, 2, most=80) for start in (0, 5)] == [5, 8]
    # One that is larger than a round may be is a round of its own.
    ends = [distributed._round_end(pieces, start, 2, most=39) for start in range(8)]
    assert ends == [3, 3, 3, 4, 5, 7, 7, 8]


def test_alone_there_is_no_group(monkeypatch, tmp_path):
    assert distributed.launched_group() is None and local_ranks() == 1
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.1:5001"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    for rank, expected in enumerate((2, 1, 2)):
        monkeypatch.setenv("MLX_RANK", str(rank))
        assert local_ranks() == expected
