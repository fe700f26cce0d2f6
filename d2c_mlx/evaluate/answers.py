"""Greedy answers to held-out rows, to judge by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.rows import Row, row_format
from d2c_mlx.utils.progress import Progress

__all__ = ["answer_rows", "max_answer_tokens", "prompt_and_expected"]


class Answerer(Protocol):
    """A model that answers: `BaseModel` or `StockModel`."""

    tokenizer: Any

    def attach(self, adapter: Adapter | None, /) -> None:
        """Put an adapter in place of the last one."""

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Greedy tokens after each prompt."""


def answer_rows(
    model: Answerer,
    methods: Mapping[str, BenchMethod],
    tasks: Iterable[tuple[Sequence[Row], ExampleSet]],
    progress: Progress | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Greedy answers to some rows of tasks under every method's first variant.

    An answer is cut after `max_answer_tokens`. All rows under one adapter are answered at once.

    Args:
        model: the last adapter stays attached to it.
        methods: name -> what serves the tasks.
        tasks: of each task rows as read, and the same rows tokenized, and maybe more. Of rows in
            mlx-lm's `text` format, which have no prompt, there are no answers.
        progress: shows progress; None shows nothing.

    Returns:
        Task -> for each row `prompt` (the user's last message), `expected`, and each method's
        answer.
    """
    progress = progress or Progress()
    answered: dict[str, list[dict[str, str]]] = {}
    asked: dict[str, Sequence[Example]] = {}
    for rows, examples in tasks:
        prompts = rows if rows and row_format(rows[0]) != ("text",) else ()
        answered[examples.task] = [prompt_and_expected(row) for row in prompts]
        asked[examples.task] = examples.examples[: len(prompts)]
    adapters: dict[str, Adapter | None] = {}
    # Adapter -> task -> the methods that it serves it in.
    uses: dict[str, dict[str, list[str]]] = {}
    for name, method in methods.items():
        for task in answered:
            adapter = method.variants[0][task]
            key = adapter.digest if adapter else "base"
            adapters[key] = adapter
            uses.setdefault(key, {}).setdefault(task, []).append(name)
    for key, of in uses.items():
        batch = [(row, example, names) for task, names in of.items()
                 for row, example in zip(answered[task], asked[task])]  # fmt: skip
        most = [max_answer_tokens(example) for _, example, _ in batch]
        progress.expect(sum(most))
        model.attach(adapters[key])
        answers = model.answers([example.prompt_tokens for _, example, _ in batch], most)
        for (row, _, names), tokens in zip(batch, answers):
            text = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            row.update(dict.fromkeys(names, text))
        progress.advance(sum(most))
    return answered


def max_answer_tokens(example: Example) -> int:
    """Tokens after which an answer is cut, since by then it is wrong."""
    return 2 * example.n_targets + 16


def prompt_and_expected(row: Row) -> dict[str, str]:
    """A row's last user message as `prompt`, and its answer as `expected`."""
    if row_format(row) == ("messages",):
        asked = [message["content"] for message in row["messages"][:-1]]
        return {"prompt": asked[-1] if asked else "", "expected": row["messages"][-1]["content"]}
    return {"prompt": row["prompt"], "expected": row["completion"]}
