"""How close answers are: against metrics worked out by hand, and sacrebleu called directly."""

import random

import pytest
import sacrebleu

from d2c_mlx.evaluate.heldout import METRICS, BenchMethod, answer_metrics, answer_rows, chrf
from d2c_mlx.models.examples import Example, ExampleSet


def row(expected, **answers):
    return {"prompt": "?", "expected": expected, **answers}


def only(expected, heard):
    return answer_metrics({"t": [row(expected, m=heard)]}, ["m"])["m"]


@pytest.mark.parametrize(
    "expected, heard, exact, f1",
    [
        ("Die Katze", "Die Katze", 100, 100),
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
    found = only(expected, heard)
    assert (found["exact_match"], found["f1"]) == (exact, pytest.approx(f1))


def test_chrf_is_sacrebleus_whatever_the_texts():
    rng = random.Random(0)
    for _ in range(200):
        texts = ["".join(rng.choices("ab ä猫", k=rng.randrange(12))) for _ in range(6)]
        pairs = list(zip(texts[:3], texts[3:]))[: rng.randrange(1, 4)]
        expected = sacrebleu.corpus_chrf([a for a, _ in pairs], [[b for _, b in pairs]]).score
        assert chrf(pairs) == pytest.approx(expected), pairs


def test_tasks_count_alike_and_one_without_answers_does_not():
    answers = {
        "many": [row("a", base="a", pack="b")] * 3,
        "one": [row("a", base="b", pack="a")],
        "none": [],
    }
    found = answer_metrics(answers, ["base", "pack"])
    assert {name: one["exact_match"] for name, one in found.items()} == {"base": 50, "pack": 50}
    assert found["base"]["tasks"]["many"]["exact_match"] == 100
    assert set(found["pack"]["tasks"]) == {"many", "one"}
    assert all(set(METRICS) <= set(one) for one in found["base"]["tasks"].values())
    assert answer_metrics({"none": []}, ["base"]) == {}


class Endless:
    """Answers with its last prompt token, again and again."""

    class tokenizer:
        @staticmethod
        def decode(tokens, skip_special_tokens):
            return " ".join(map(str, tokens))

    def attach(self, adapter):
        self.adapter = adapter

    def answers(self, prompts, max_tokens):
        return [(prompt[-1],) * n for prompt, n in zip(prompts, max_tokens)]


def test_an_answer_is_cut_at_twice_the_expected_length_and_sixteen():
    examples = ExampleSet("t", (Example((1, 2, 3, 4, 5), 3),))
    rows = [{"prompt": "p", "completion": "c"}]
    methods = {"base": BenchMethod(0, [{"t": None}])}
    ((found,),) = answer_rows(Endless(), methods, [(rows, examples)]).values()
    assert found == {"prompt": "p", "expected": "c", "base": " ".join(["3"] * (2 * 2 + 16))}
    # Rows of plain text have no prompt.
    assert answer_rows(Endless(), methods, [([{"text": "p c"}], examples)]) == {"t": []}
