import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2c_mlx.probe import LossTable, _read_cache, tune_scale


class Counted:
    """A loss on scales that counts how often each was asked for."""

    def __init__(self, grid, values):
        self.value = dict(zip(grid, values))
        self.asked = []

    def __call__(self, scale):
        self.asked.append(scale)
        return self.value[scale]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_walks_to_the_minimum_at_every_index(size):
    grid = [0.5 + 0.25 * i for i in range(size)]
    for best in range(size):
        # Uneven slopes, so that the minimum is not simply the middle of the range.
        loss = Counted(grid, [(i - best) * (3 if i > best else -1) for i in range(size)])
        assert tune_scale(loss, grid) == grid[best]
        assert len(loss.asked) == len(set(loss.asked))


def test_evaluates_only_the_way_down():
    grid = list(range(101))
    loss = Counted(grid, [abs(i - 52) for i in grid])
    assert tune_scale(loss, grid) == 52
    assert sorted(loss.asked) == [49, 50, 51, 52, 53]


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
    assert tune_scale(Counted(grid, values), grid) == grid[best]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_any_loss_ends_in_a_local_minimum(values):
    grid = [0.1 * (i + 1) for i in range(len(values))]
    loss = Counted(grid, values)
    i = grid.index(tune_scale(loss, grid))
    assert len(loss.asked) == len(set(loss.asked))
    assert i == 0 or values[i - 1] > values[i]
    assert i == len(values) - 1 or values[i + 1] >= values[i]
    assert values[i] <= values[len(values) // 2]


def test_loss_table_json():
    rng = np.random.default_rng(0)
    table = LossTable(("de", "en ü"), ("a", "b"), rng.random((2, 2)) / 3, rng.random(2))
    data = json.loads(json.dumps(table.to_json()))
    assert data["unit"] == "mean NLL per target token (nats)"
    back = LossTable.from_json(data)
    assert (back.tasks, back.adapters) == (table.tasks, table.adapters)
    # JSON keeps every bit of a float64.
    assert np.array_equal(back.values, table.values)
    assert np.array_equal(back.base, table.base)
    assert back.individual.tolist() == [table.values[0, 0], table.values[1, 1]]
    assert back.to_json() == table.to_json()


def test_no_cache_yet(tmp_path):
    assert _read_cache(tmp_path / "none.jsonl") == {}
    assert not (tmp_path / "none.jsonl").exists()


def test_whole_cache_is_left_alone(tmp_path):
    path = tmp_path / "cache.jsonl"
    content = '["a", 1.5]\n["b", 0.1]\n["a", 2.5]\n'
    path.write_text(content)
    assert _read_cache(path) == {"a": 2.5, "b": 0.1}
    assert path.read_text() == content


@pytest.mark.parametrize(
    "rest",
    ['["c", 1.2', '["c', "[", "\x00\x00", '["c", 1.25]'],
    ids=["value", "key", "bracket", "zeros", "no newline"],
)
@pytest.mark.parametrize("kept", ['["a", 1.5]\n["b", 0.1]\n', ""], ids=["two lines", "nothing"])
def test_cut_off_line_is_dropped(tmp_path, kept, rest):
    path = tmp_path / "cache.jsonl"
    path.write_text(kept + rest)
    known = dict(json.loads(line) for line in kept.splitlines())
    assert _read_cache(path) == known
    assert path.read_text() == kept
    # Without the truncation the next line would be glued to the broken one.
    with open(path, "a") as file:
        file.write('["d", 4.5]\n')
    assert _read_cache(path) == {**known, "d": 4.5}
