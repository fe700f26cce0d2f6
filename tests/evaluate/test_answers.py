"""How close answers are: against metrics worked out by hand, and sacrebleu called directly."""

import random

import pytest
import sacrebleu

from d2c_mlx.evaluate.heldout import METRICS, answer_metrics, chrf


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
