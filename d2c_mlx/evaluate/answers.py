"""Greedy answers to held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Greedy tokens after each prompt."""


def answer_rows(
    model: Answerer,
    methods: Mapping[str, BenchMethod],
    tasks: Iterable[tuple[Sequence[Row], ExampleSet]],
    meter: Meter | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Greedy answers to some rows of tasks under every method's first variant.

    An answer is cut after `max_answer_tokens`. All rows under one adapter are answered at once.

    Args:
        model: the last adapter stays attached to it.
        methods: name -> what serves the tasks.
        tasks: of each task rows as read, and the same rows tokenized, and maybe more. Of rows in
            mlx-lm's `text` format, which have no prompt, there are no answers.
        meter: shows progress; None shows nothing.

    Returns:
        Task -> for each row `prompt` (the user's last message), `expected`, and each method's
        answer.
    """
    meter = meter or Silent()
    found: dict[str, list[dict[str, str]]] = {}
    asked: dict[str, Sequence[Example]] = {}
    for rows, examples in tasks:
        some = rows if rows and row_format(rows[0]) != ("text",) else ()
        found[examples.task] = [prompt_and_expected(row) for row in some]
        asked[examples.task] = examples.examples[: len(some)]
    # Adapter -> where its answers belong; several methods may use one.
    places: dict[str, list[tuple[str, str]]] = {}
    adapters: dict[str, Adapter | None] = {}
    for name, method in methods.items():
        for task in found:
            adapter = method.variants[0][task]
            key = adapter.digest if adapter else "base"
            adapters[key] = adapter
            places.setdefault(key, []).append((name, task))
    jobs = {key: [(task, row) for task in dict.fromkeys(task for _, task in of)
                  for row in range(len(found[task]))] for key, of in places.items()}  # fmt: skip
    costs = {key: [max_answer_tokens(asked[task][row]) for task, row in rows]
             for key, rows in jobs.items()}  # fmt: skip
    meter.expect(sum(map(sum, costs.values())))
    for key, rows in jobs.items():
        model.attach(adapters[key])
        answers = model.answers([asked[task][row].prompt_tokens for task, row in rows], costs[key])
        for (task, row), tokens in zip(rows, answers):
            said = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            found[task][row] |= {name: said for name, of in places[key] if of == task}
        meter.advance(sum(costs[key]))
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
