"""Greedy answers to held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.evaluator import Meter, Silent
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.tasks import Row, row_format

__all__ = ["answer_rows", "max_answer_tokens", "prompt_and_expected"]


class Answerer(Protocol):
    """A model that answers: `BaseModel` or `StockModel`."""

    tokenizer: Any

    def attach(self, adapter: Adapter | None, /) -> None:
        """Put an adapter in place of the last one."""

    def answer(self, prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Greedy tokens after a prompt."""


def answer_rows(
    model: Answerer,
    methods: Mapping[str, BenchMethod],
    rows: Sequence[Row],
    examples: ExampleSet,
    meter: Meter | None = None,
) -> list[dict[str, str]]:
    """Greedy answers to some rows of one task under every method's first variant.

    An answer is cut after `max_answer_tokens`.

    Args:
        model: the last adapter stays attached to it.
        methods: name -> what serves the task.
        rows: rows as read; of rows in mlx-lm's `text` format, which have no prompt, there are no
            answers.
        examples: the same rows tokenized, and maybe more.
        meter: shows progress; None shows nothing.

    Returns:
        For each row `prompt` (the user's last message), `expected`, and each method's answer.
    """
    if not rows or row_format(rows[0]) == ("text",):
        return []
    found = [prompt_and_expected(row) for row in rows]
    meter = meter or Silent()
    most = [max_answer_tokens(example) for _, example in zip(rows, examples.examples)]
    meter.expect(len(methods) * sum(most))
    for name, method in methods.items():
        model.attach(method.variants[0][examples.task])
        for entry, example, n_tokens in zip(found, examples.examples, most):
            tokens = model.answer(example.prompt_tokens, n_tokens)
            meter.advance(n_tokens)
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
