"""What is evaluated together and in which order: rows in batches, sets in threads, what is kept."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from d2c_mlx.evaluate.batches import shared_prefix, split_rows
from d2c_mlx.evaluate.workers import ByteCache, Workers
from d2c_mlx.models.examples import Example, ExampleSet


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
    for key in "abc":
        kept.put(key, key, 40)
    assert kept.get("a") is None and kept.get("b") and kept.get("c")
    kept.put("huge", "huge", 104)
    assert kept.get("huge") is None and kept.get("b")
    kept.put("c", "larger", 60)
    assert kept.get("c") == "larger" and kept.get("b")
    kept.put("d", "d", 40)
    assert kept.get("b") is None and kept.get("c")


def test_one_thread_takes_chunks_in_order():
    sets, chunks = [SimpleNamespace(n_tokens=n) for n in (4000, 4000, 10, 9000, 1)], []
    done = list(Workers(1).run(lambda chunk: chunks.append(len(chunk)) or chunk, sets))
    assert chunks == [2, 2, 1] and done == list(enumerate(sets))


def test_workers_take_the_largest_first_and_stop_when_no_one_listens():
    row = Example((1, 2, 3), 1)
    many = [ExampleSet(str(i), (row,) * (i + 1)) for i in range(6)]
    seen = []

    def body(some):
        seen.append(some[0].task)
        return [some[0].n_tokens]

    workers = Workers(2)
    assert sorted(workers.run(body, many)) == [(i, one.n_tokens) for i, one in enumerate(many)]
    assert seen[0] == "5"
    found = workers.run(lambda some: [1 / 0], many)
    with pytest.raises(ZeroDivisionError):
        next(found)


@pytest.mark.slow
def test_a_process_whose_threads_evaluated_ends_well():
    """MLX aborts at exit if a thread has left its stream: two processes in three did."""
    code = """
import d2c_mlx
import mlx.core as mx
from types import SimpleNamespace
from d2c_mlx.evaluate.workers import Workers

def evaluate(some):
    x = mx.ones((50, 50))
    mx.eval(x @ x)
    return [len(some)]

for _ in range(2):  # the first pool is dropped while its threads wait
    workers = Workers(2)
    assert len(list(workers.run(evaluate, [SimpleNamespace(n_tokens=i) for i in range(9)]))) == 9
"""
    argv = [sys.executable, "-c", code]
    several = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in several:
        _, err = process.communicate()
        assert process.returncode == 0, err
