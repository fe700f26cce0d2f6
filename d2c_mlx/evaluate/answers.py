"""Greedy answers to held-out rows, and metrics of how close they come to the expected ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.tasks import Row, row_format

__all__ = [
    "METRICS",
    "METRIC_NAMES",
    "answer_metrics",
    "answer_rows",
    "normalize_text",
    "max_answer_tokens",
    "prompt_and_expected",
    "word_f1",
]

METRICS = ("exact_match", "f1", "chrf")
METRIC_NAMES = ("exact match", "F1", "chrF")


class Answerer(Protocol):
    """A model that answers: `BaseModel` or `StockModel`."""

    tokenizer: Any

    def attach(self, adapter: Adapter | None, /) -> None:
        """Put an adapter in place of the last one."""

    def answer(self, prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Greedy tokens after a prompt."""


def answer_rows(
    model: Answerer, methods: Mapping[str, BenchMethod], rows: Sequence[Row], examples: ExampleSet
) -> list[dict[str, str]]:
    """Greedy answers to some rows of one task under every method's first variant.

    An answer is cut after `max_answer_tokens`.

    Args:
        model: the last adapter stays attached to it.
        methods: name -> what serves the task.
        rows: rows as read; of rows in mlx-lm's `text` format, which have no prompt, there are no
            answers.
        examples: the same rows tokenized, and maybe more.

    Returns:
        For each row `prompt` (the user's last message), `expected`, and each method's answer.
    """
    if not rows or row_format(rows[0]) == ("text",):
        return []
    found = [prompt_and_expected(row) for row in rows]
    for name, method in methods.items():
        model.attach(method.variants[0][examples.task])
        for entry, example in zip(found, examples.examples):
            tokens = model.answer(example.prompt_tokens, max_answer_tokens(example))
            entry[name] = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return found


def max_answer_tokens(example: Example) -> int:
    """Tokens after which an answer is cut, since by then it is wrong."""
    return 2 * example.n_targets + 16


def prompt_and_expected(row: Row) -> dict[str, str]:
    """A row's last user message as `prompt`, and its answer as `expected`."""
    if row_format(row) == ("messages",):
        asked = [one["content"] for one in row["messages"][:-1]]
        return {"prompt": asked[-1] if asked else "", "expected": row["messages"][-1]["content"]}
    return {"prompt": row["prompt"], "expected": row["completion"]}


def answer_metrics(
    answers: Mapping[str, Sequence[Mapping[str, str]]], methods: Sequence[str]
) -> dict[str, Any]:
    """Metrics of every method's answers, in percent; higher is better.

    `exact_match`: share of answers equal to the expected one but for case and white space. `f1`:
    words in common, as SQuAD counts them (arXiv 1606.05250) but in any language: punctuation goes,
    articles stay. `chrf`: character n-grams in common, sacrebleu's chrF2 over all answers of a task
    (https://aclanthology.org/W15-3049).

    Args:
        answers: task -> `answer_rows` of it; tasks without answers are left out.
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
                "exact_match": _mean([normalize_text(a) == normalize_text(b) for a, b in pairs]),
                "f1": _mean([word_f1(a, b) for a, b in pairs]),
                "chrf": float(chrf.corpus_score(heard, [expected]).score),
            }
        if tasks:
            means = {key: sum(one[key] for one in tasks.values()) / len(tasks) for key in METRICS}
            result[method] = {**means, "tasks": tasks}
    return result


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def normalize_text(text: str) -> str:
    """The text in one case, with single spaces, for `exact_match`."""
    return " ".join(text.casefold().split())


def word_f1(heard: str, expected: str) -> float:
    """F1 of words in any case and order: 2 x common / all; 1 where both texts have none."""
    a, b = (Counter(re.findall(r"\w+", text.casefold())) for text in (heard, expected))
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0
