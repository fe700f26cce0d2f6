import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.evaluate.scorer import LossCache, LossTable
from d2c_mlx.utils.errors import D2CError
from d2c_mlx.utils.files import held
from d2c_mlx.utils.line_search import line_search


class Counted:
    """A loss on scales that counts how often each was asked for."""

    def __init__(self, grid, values):
        self.value = dict(zip(grid, values))
        self.asked = []

    def __call__(self, scale):
        self.asked.append(scale)
        return self.value[scale]


def test_evaluates_only_the_way_down():
    grid = list(range(101))
    loss = Counted(grid, [abs(i - 52) for i in grid])
    assert line_search(loss, grid)[0] == 52
    assert sorted(loss.asked) == [49, 50, 51, 52, 53]


@pytest.mark.parametrize(("start", "first"), [(0.01, 0), (1.3, 0), (1.5, 1), (5.0, 2), (99, 3)])
def test_begins_next_to_its_start_by_ratio(start, first):
    grid = [1.0, 2.0, 4.0, 8.0]
    loss = Counted(grid, [abs(i - first) for i in range(4)])
    assert line_search(loss, grid, start)[0] == grid[first]
    assert sorted(loss.asked) == grid[max(first - 1, 0) : first + 2]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([1, 1, 1, 1, 1], 0),
        ([3, 2, 1, 1, 2], 2),
        ([3, 1, 1, 2, 3], 1),
        # From the middle both neighbours are lower and equal: left.
        ([2, 1, 3, 1, 2], 1),
        ([9, 5, 5, 0, 0], 3),
    ],
)
def test_ties_keep_the_smaller(values, best):
    grid = [1.0, 1.25, 1.5, 1.75, 2.0]
    assert line_search(Counted(grid, values), grid)[0] == grid[best]


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.none() | st.floats(0.01, 5))
def test_any_loss_ends_in_a_local_minimum(values, start):
    grid = [0.1 * (i + 1) for i in range(len(values))]
    loss = Counted(grid, values)
    i = grid.index(line_search(loss, grid, start)[0])
    assert len(loss.asked) == len(set(loss.asked))
    assert i == 0 or values[i - 1] > values[i]
    assert i == len(values) - 1 or values[i + 1] >= values[i]
    assert start or values[i] <= values[len(values) // 2]


def test_loss_table_json():
    rng = np.random.default_rng(0)
    table = LossTable(
        ("de", "en ü"), rng.random(2) / 3, rng.random(2), (0.2, 0.5), rng.random((2, 2))
    )
    data = json.loads(json.dumps(table.to_json()))
    assert data["unit"] == "mean NLL per target token (nats)"
    back = LossTable.from_json(data)
    assert (back.tasks, back.strengths) == (table.tasks, table.strengths)
    # JSON keeps every bit of a float64.
    for name in ("individual", "base", "weakened"):
        assert np.array_equal(getattr(back, name), getattr(table, name))
    assert back.to_json() == table.to_json()


def test_the_cache_keeps_every_bit(tmp_path):
    path = tmp_path / "deep" / "losses.sqlite"
    values = {"a": [0.1 + 0.2, 1e-300], "c": [5.0]}
    cache = LossCache(path)
    for key, rows in values.items():
        cache.put(key, np.array(rows))
        cache.put(key, np.array([7.0]))  # the first one stays
    other = LossCache(path)
    assert {key: other.get(key).tolist() for key in values} == values
    assert other.get("d") is None
    other.put("d", np.array([1.5]))
    assert cache.get("d").tolist() == [1.5]


def test_two_processes_do_not_make_the_cache_at_once(tmp_path):
    """SQLite would tell one of them that the database is locked, whatever the timeout."""
    path, made = tmp_path / "losses.sqlite", []
    thread = threading.Thread(target=lambda: made.append(LossCache(path).get("a")))
    with held(tmp_path):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(60)
    assert made


def test_a_broken_cache_is_named(tmp_path):
    path = tmp_path / "losses.sqlite"
    path.write_bytes(b"not a database, but as long as one" * 100)
    for bad in (path, path / "under a file"):
        with pytest.raises(D2CError, match="cannot be used as the cache .* delete it"):
            LossCache(bad).put("a", np.ones(1))
