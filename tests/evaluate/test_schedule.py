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
    with pytest.raises(ZeroDivisionError):
        next(Workers(2).run(lambda chunk: [1 / 0], sets))


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
