"""Losses that are kept, and the search of a scale by them; metrics of answers."""

import json
import random
import threading

import numpy as np
import pytest
import sacrebleu
from helpers.runs import config_of
from helpers.tiny import library
from hypothesis import example, given, settings
from hypothesis import strategies as st

from d2c_mlx.evaluate.heldout import METRICS, answer_metrics, chrf
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
    for rows in ([0.1 + 0.2, 1e-300], [7.0]):
        cache.put("a", np.array(rows))
    # The first one stays.
    assert other.get("a").tolist() == [0.1 + 0.2, 1e-300] and other.get("d") is None
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


# How close answers are: metrics worked out by hand, and sacrebleu called directly


def row(expected, **answers):
    return {"prompt": "?", "expected": expected, **answers}


@pytest.mark.parametrize(
    "expected, heard, exact, f1",
    [
        ("Die Katze", " die  katze", 100, 100),
        ("Die Katze", "Die Katze.", 0, 100),
        # One of two words and one of four in common: 2 x 1 / 6.
        ("die Katze", "katze und ein hund", 0, 100 / 3),
        # A word counts as often as it is in both.
        ("ja ja nein", "ja ja ja", 0, 200 / 3),
        ("hm", "", 0, 0),
        ("猫が好き", "猫が好き", 100, 100),
        ("!", "?", 0, 100),
    ],
)
def test_exact_match_and_f1(expected, heard, exact, f1):
    metrics = answer_metrics({"t": [row(expected, m=heard)]}, ["m"])["m"]
    assert (metrics["exact_match"], metrics["f1"]) == (exact, pytest.approx(f1))


def test_chrf_is_sacrebleus_whatever_the_texts():
    rng = random.Random(0)
    for _ in range(200):
        texts = ["".join(rng.choices("ab ä猫", k=rng.randrange(12))) for _ in range(6)]
        pairs = list(zip(texts[:3], texts[3:]))[: rng.randrange(1, 4)]
        expected = sacrebleu.corpus_chrf([a for a, _ in pairs], [[b for _, b in pairs]]).score
        assert chrf(pairs) == pytest.approx(expected), pairs


def test_tasks_count_alike_and_one_without_answers_does_not():
    many, few = [row("a", base="a", pack="b")] * 3, [row("a", base="b", pack="a")]
    metrics = answer_metrics({"many": many, "few": few, "none": []}, ["base", "pack"])
    assert {name: x["exact_match"] for name, x in metrics.items()} == {"base": 50, "pack": 50}
    tasks = metrics["base"]["tasks"]
    assert tasks.keys() == {"many", "few"} and tasks["many"]["exact_match"] == 100
    assert all(set(METRICS) <= set(task) for task in tasks.values())
    assert answer_metrics({"none": []}, ["base"]) == {}
