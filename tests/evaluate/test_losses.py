"""Losses that are kept, and the search of a scale by them; metrics of answers."""

import json
import sqlite3
import threading

import numpy as np
import pytest
from helpers.runs import config_of
from helpers.tiny import library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2c_mlx.evaluate.heldout import right_answers, same_text
from d2c_mlx.evaluate.scorer import LossCache, LossTable
from d2c_mlx.merge.methods import scaled
from d2c_mlx.pipeline import run
from d2c_mlx.utils.errors import D2CError
from d2c_mlx.utils.files import held
from d2c_mlx.utils.line_search import line_search


def minimum(grid, values, start=None):
    """Index of what the search ends at, and the scales it asked for: none of them twice."""
    asked = []

    def loss(scale):
        asked.append(scale)
        return values[grid.index(scale)]

    i = grid.index(line_search(loss, grid, start)[0])
    assert len(asked) == len(set(asked))
    return i, sorted(asked)


def test_begins_next_to_its_start_by_ratio():
    grid = [1.0, 2.0, 4.0, 8.0]
    for start, first in ((0.01, 0), (1.3, 0), (1.5, 1), (5.0, 2), (99, 3)):
        near = grid[max(first - 1, 0) : first + 2]
        assert minimum(grid, [abs(i - first) for i in range(4)], start) == (first, near)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.none() | st.floats(0.01, 5))
@example([2, 1, 3, 1, 2], None).via("From the middle both are lower and equal: left.")
def test_any_loss_ends_in_a_local_minimum_of_ties_the_smaller(values, start):
    i, _ = minimum([0.1 * (i + 1) for i in range(len(values))], values, start)
    assert i == 0 or values[i - 1] > values[i]
    assert i == len(values) - 1 or values[i + 1] >= values[i]
    assert start or values[i] <= values[len(values) // 2]
    assert values != [2, 1, 3, 1, 2] or start or i == 1


def test_the_cache_keeps_every_bit(tmp_path):
    path = tmp_path / "deep" / "losses.sqlite"
    cache, other = LossCache(path), LossCache(path)
    for rows in ([7.0], [0.1 + 0.2, 1e-300]):
        cache.put("a", np.array(rows))
    assert other.get("a").tolist() == [0.1 + 0.2, 1e-300] and other.get("d") is None
    other.put("d", np.array([1.5]))
    assert cache.get("d").tolist() == [1.5]


@pytest.mark.parametrize("damage", [
    "'text'", "7", "x''", "x'00'", "zeroblob(16)", "zeroblob(24)", "substr(sums, 2)",
    "sums || zeroblob(8)", "substr(sums, 17)", "(SELECT sums FROM rows WHERE key = 'b')",
])  # fmt: skip
def test_a_damaged_loss_is_evaluated_again(tmp_path, damage):
    path = tmp_path / "losses.sqlite"
    cache = LossCache(path)
    for key, sums in (("a", [1.0, 2.0]), ("b", [3.0, 4.0])):
        cache.put(key, np.array(sums))
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"UPDATE rows SET sums = {damage} WHERE key = 'a'")
    connection.close()
    assert cache.get("a") is None
    cache.put("a", np.array([5.0]))
    assert cache.get("a").tolist() == [5.0] and cache.get("b").tolist() == [3.0, 4.0]


def test_two_processes_do_not_make_the_cache_at_once(tmp_path):
    """SQLite would tell one of them that the database is locked, whatever the timeout."""
    path, losses = tmp_path / "losses.sqlite", []
    thread = threading.Thread(target=lambda: losses.append(LossCache(path).get("a")))
    with held(tmp_path):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(60)
    assert losses


def test_a_broken_cache_is_named(tmp_path):
    path = tmp_path / "losses.sqlite"
    path.write_bytes(b"not a database, but as long as one" * 100)
    for bad in (path, path / "under a file"):
        with pytest.raises(D2CError, match="cannot be used as the cache .* delete it"):
            LossCache(bad).put("a", np.ones(1))


@pytest.mark.parametrize("table", [
    "VIEW rows AS WITH RECURSIVE r(key, sums) AS (SELECT 1, 2 UNION ALL SELECT key + 1, 2 FROM r)"
    " SELECT * FROM r", "TABLE rows (key TEXT PRIMARY KEY, sums AS (zeroblob(9)))",
    "TRIGGER t AFTER INSERT ON rows BEGIN DELETE FROM rows; END",
])  # fmt: skip
def test_a_cache_with_other_tables_is_named(tmp_path, table):
    LossCache(tmp_path / "losses.sqlite").put("a", np.ones(1))
    connection = sqlite3.connect(tmp_path / "losses.sqlite", isolation_level=None)
    if "TRIGGER" not in table:
        connection.execute("DROP TABLE rows")
    connection.execute(f"CREATE {table}")
    connection.close()
    with pytest.raises(D2CError, match="it holds other tables, views or triggers.; delete it"):
        LossCache(tmp_path / "losses.sqlite").get("a")


def test_regret_is_0_at_the_own_adapter_and_1_at_the_base_and_has_two_floors():
    def table(own, base):
        return LossTable(tuple("abcdefgh"[: len(base)]), np.array(own), np.array(base))

    losses = table([0.5, 2.0, 3.0], [1.5, 4.0, 3.5])
    both = losses.regret(np.stack([losses.base, losses.individual], axis=1))
    assert both == pytest.approx(np.tile([1.0, 0.0], (3, 1)))
    assert losses.regret(np.array([3.75, 0.5]), np.array([2, 0])) == pytest.approx([1.5, 0.0])
    # Gains of 0.5, 0.05, 0.01, 0 and -1 nats.
    small = table([1.0] * 5, [1.5, 1.05, 1.01, 1.0, 0.0])
    assert small.regret(np.full(5, 1.1)) == pytest.approx([0.2, 2.0, 2.0, 2.0, 2.0])
    assert small.gain == pytest.approx([0.5, 0.05, 0.05, 0.05, 0.05])
    # The second adapter is 1.3 nats worse than the base model.
    worse = table([0.5, 2.3], [5.0, 1.0])
    assert worse.regret(worse.base) == pytest.approx([1.0, -1.0])


def test_a_run_measures_task_adapters_at_several_strengths(tmp_path):
    paths = library(tmp_path, list("abcd"))
    config = config_of(paths, tmp_path / "run", budget="2", probe_examples=2, test_examples=2)
    session = run(config, until="probe", quiet=True)
    content = session.read("losses.json")
    table = LossTable.from_json(content)
    # JSON keeps every bit of a float64.
    assert json.loads(json.dumps(table.to_json())).items() <= content.items()
    assert content["unit"] == "mean NLL per target token (nats)"
    assert table.tasks == tuple("abcd") and table.weakened.shape == (4, 2)
    scorer, probes = session.library.scorer, session.library.calibration
    columns = zip((*table.strengths, 1.0), (*table.weakened.T, table.individual))
    for strength, losses in columns:
        for adapter, probe, loss in zip(session.library.adapters, probes, losses):
            weaker = scaled(adapter, strength).uniform(session.library.base.dtype)
            ((measured,),) = scorer.losses([(weaker, [probe])])
            assert loss == pytest.approx(measured, rel=1e-6)
    assert table.base == pytest.approx(scorer.losses([(None, probes)])[0], rel=1e-6)


def test_answers_are_right_but_for_case_and_white_space_and_tasks_count_alike():
    assert same_text(" die  katze", "Die Katze") and same_text("猫が好き", "猫が好き")
    assert not same_text("Die Katze.", "Die Katze") and not same_text("", "hm")
    many, few = (
        [{"expected": "a", "base": "a", "pack": "b"}] * 3,
        [{"expected": "a", "base": "b", "pack": "a"}],
    )
    shares = right_answers({"many": many, "few": few, "none": []}, ["base", "pack"])
    assert shares == {"base": 0.5, "pack": 0.5}
    assert right_answers({"none": []}, ["base"]) == {}
