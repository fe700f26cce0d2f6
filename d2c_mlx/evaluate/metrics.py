"""Metrics of answers: how close texts come to the expected ones. It knows no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["METRICS", "METRIC_NAMES", "answer_metrics", "chrf", "normalize_text", "word_f1"]

METRICS = ("exact_match", "f1", "chrf")
METRIC_NAMES = ("exact match", "F1", "chrF")
# Characters of the longest n-grams of chrF. Answers are scored in every run, and sacrebleu with its
# lxml would come to each installation for it; tests compare with sacrebleu.
_CHRF_ORDER = 6


def answer_metrics(
    answers: Mapping[str, Sequence[Mapping[str, str]]], methods: Sequence[str]
) -> dict[str, Any]:
    """Metrics of every method's answers, in percent; higher is better.

    `exact_match`: share of answers equal to the expected one but for case and white space. `f1`:
    words in common, as SQuAD counts them (arXiv 1606.05250) but in any language: punctuation goes,
    articles stay. `chrf`: see `chrf`, over all answers of a task.

    Args:
        answers: task -> `answers.answer_rows` of it; tasks without answers are left out.
        methods: names among each row's keys.

    Returns:
        Method -> each metric as a mean over tasks, and `tasks`: task -> each metric.
    """
    result: dict[str, Any] = {}
    for method in methods:
        tasks = {}
        for task, rows in answers.items():
            if not rows:
                continue
            pairs = [(row[method], row["expected"]) for row in rows]
            tasks[task] = {
                "exact_match": _mean([normalize_text(a) == normalize_text(b) for a, b in pairs]),
                "f1": _mean([word_f1(a, b) for a, b in pairs]),
                "chrf": chrf(pairs),
            }
        if tasks:
            means = {
                key: sum(scores[key] for scores in tasks.values()) / len(tasks) for key in METRICS
            }
            result[method] = {**means, "tasks": tasks}
    return result


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def normalize_text(text: str) -> str:
    """The text in one case, with single spaces, for `exact_match`."""
    return " ".join(text.casefold().split())


def chrf(pairs: Sequence[tuple[str, str]]) -> float:
    """chrF2 of answers against the expected ones, in percent: character n-grams in common.

    Precision and recall are means over n from 1 to 6, counted over all answers and without white
    space; recall counts twice (https://aclanthology.org/W15-3049).

    Args:
        pairs: each answer, and what was expected.
    """
    texts = [("".join(heard.split()), "".join(expected.split())) for heard, expected in pairs]
    precision = recall = 0.0
    orders = 0
    for n in range(1, _CHRF_ORDER + 1):
        common = answered = asked = 0
        for a, b in ((_ngrams(heard, n), _ngrams(expected, n)) for heard, expected in texts):
            common += (a & b).total()
            answered += a.total() if b else 0
            asked += b.total()
        if answered and asked:
            orders += 1
            precision += common / answered
            recall += common / asked
    if not precision + recall:
        return 0.0
    return 100 * 5 * precision * recall / (4 * precision + recall) / orders


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def word_f1(heard: str, expected: str) -> float:
    """F1 of words in any case and order: 2 x common / all; 1 where both texts have none."""
    a, b = (Counter(re.findall(r"\w+", text.casefold())) for text in (heard, expected))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0
