"""Greedy answers to held-out rows, and how close they come to what was expected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.heldout import Method
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.tasks import Row, row_format

__all__ = [
    "METRICS",
    "METRIC_NAMES",
    "answer_metrics",
    "answer_rows",
    "folded",
    "longest",
    "question",
    "word_f1",
]

METRICS = ("exact_match", "f1", "chrf")
METRIC_NAMES = ("exact match", "F1", "chrF")


class Answerer(Protocol):
    """What answers: `BaseModel` and `StockModel`."""

    tokenizer: Any

    def attach(self, adapter: Adapter | None, /) -> None:
        """Put an adapter in place of the last one."""

    def answer(self, prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Greedy tokens after a prompt."""


def answer_rows(
    model: Answerer, methods: Mapping[str, Method], rows: Sequence[Row], examples: ExampleSet
) -> list[dict[str, str]]:
    """Greedy answers to some rows of one task under every method's first variant.

    An answer is cut after `longest` tokens.

    Args:
        model: afterwards the last adapter is attached.
        methods: name -> what serves the task.
        rows: as read; none of mlx-lm's `text`, which have no prompt.
        examples: the same rows tokenized, and maybe more.

    Returns:
        For each row `prompt` (what the user said last), `expected`, and the answer of each method.
    """
    if not rows or row_format(rows[0]) == ("text",):
        return []
    found = [question(row) for row in rows]
    for name, method in methods.items():
        model.attach(method.variants[0][examples.task])
        for entry, example in zip(found, examples.examples):
            tokens = model.answer(example.asked, longest(example))
            entry[name] = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return found


def longest(example: Example) -> int:
    """Tokens after which an answer is cut: by then it is wrong."""
    return 2 * example.n_targets + 16


def question(row: Row) -> dict[str, str]:
    """What a row's user said last as `prompt`, and the answer as `expected`."""
    if row_format(row) == ("messages",):
        asked = [one["content"] for one in row["messages"][:-1]]
        return {"prompt": asked[-1] if asked else "", "expected": row["messages"][-1]["content"]}
    return {"prompt": row["prompt"], "expected": row["completion"]}


def answer_metrics(
    answers: Mapping[str, Sequence[Mapping[str, str]]], methods: Sequence[str]
) -> dict[str, Any]:
    """How close the answers of every method are, in percent, the higher the better.

    `exact_match`: share of answers equal to the expected one but for case and white space. `f1`:
    words in common, as SQuAD counts them (arXiv 1606.05250) but in any language: punctuation goes,
    articles stay. `chrf`: character n-grams in common, sacrebleu's chrF2 over all answers of a task
    (https://aclanthology.org/W15-3049).

    Args:
        answers: task -> what `answer_rows` found; tasks without answers are left out.
        methods: names among each row's keys.

    Returns:
        Method -> each metric as a mean over tasks, and `tasks`: task -> each metric.
    """
    if not any(answers.values()):
        return {}
    # The extra `answers`; callers check with `require_extra` before they generate.
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    result: dict[str, Any] = {}
    for method in methods:
        tasks = {}
        for task, rows in answers.items():
            if not rows:
                continue
            pairs = [(row[method], row["expected"]) for row in rows]
            heard, expected = zip(*pairs)
            tasks[task] = {
                "exact_match": _mean([folded(a) == folded(b) for a, b in pairs]),
                "f1": _mean([word_f1(a, b) for a, b in pairs]),
                "chrf": float(chrf.corpus_score(heard, [expected]).score),
            }
        if tasks:
            means = {key: sum(one[key] for one in tasks.values()) / len(tasks) for key in METRICS}
            result[method] = {**means, "tasks": tasks}
    return result


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def folded(text: str) -> str:
    """The text without case, and with single spaces alone."""
    return " ".join(text.casefold().split())


def word_f1(heard: str, expected: str) -> float:
    """F1 of words, whatever their case and order: 2 x common / all, 1 where both have none."""
    a, b = (Counter(re.findall(r"\w+", text.casefold())) for text in (heard, expected))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0
