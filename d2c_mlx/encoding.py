"""Rows to token ids, as mlx-lm's trainer makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tuner.datasets import create_dataset

from d2c_mlx.errors import TaskError, gather
from d2c_mlx.examples import Example, ExampleSet
from d2c_mlx.tasks import Row, Task, row_format

__all__ = ["Encode", "encode", "encode_probes", "encode_tests"]

# `encode` of one model: name of the set, its rows, and where each stands.
Encode = Callable[[str, Sequence[Row], Sequence[str]], ExampleSet]

# What tokenizers and the templates of strangers raise; IndexError, for a text without a token.
_UNTOKENIZED = (ValueError, TypeError, LookupError, AttributeError, TemplateError)


def encode_probes(encode: Encode, tasks: Iterable[Task], n: int | None) -> list[ExampleSet]:
    """The first `n` probe rows of every task, None for all; TaskError names all bad rows."""
    return gather(partial(encode, one.name, one.probe[:n], one.probe_places) for one in tasks)


def encode_tests(encode: Encode, tasks: Iterable[Task], n: int | None) -> list[ExampleSet]:
    """The first `n` test rows of every task, None for all; TaskError names all bad rows."""
    return gather(partial(encode, one.name, one.test[:n], one.test_places) for one in tasks)


def encode(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    task: str,
    rows: Sequence[Row],
    places: Sequence[str] = (),
    context: int | None = None,
) -> ExampleSet:
    """Tokenize rows with mlx-lm's own dataset classes, prompts masked.

    Args:
        tokenizer: of the model.
        task: name of the set.
        rows: of one format.
        places: where each row stands, and maybe more; none names rows by task and number.
        context: most tokens of a row.

    Raises:
        TaskError: every row that the chat template refuses, that has no target token or is too
            long.
    """
    options = SimpleNamespace(mask_prompt=row_format(rows[0]) != ("text",))
    examples: list[Example] = []
    problems = []
    failed: dict[str, list[str]] = {}
    for row, place in zip(rows, places or [f"task {task}: row {i + 1}" for i in range(len(rows))]):
        try:
            tokens, offset = create_dataset([row], tokenizer, options).process(row)
        except _UNTOKENIZED as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed.setdefault(reason, []).append(place)
            continue
        one = Example(tuple(map(int, tokens)), int(offset))
        examples.append(one)
        if one.n_targets < 1:
            problems.append(
                f"{place} has no target token: found {len(one.tokens):,} tokens, expected more than"
                f" the {one.first_target:,} that are given; complete the row or remove it"
            )
        elif context and len(one.tokens) > context:
            problems.append(
                f"{place} has {len(one.tokens):,} tokens, more than the model's context of"
                f" {context:,}; shorten it"
            )
    # Without a chat template it is every row, for one reason.
    problems += [
        f"{first}: mlx-lm cannot tokenize it{f', nor {len(more)} rows more' if more else ''}"
        f" ({reason}); change it as the model's chat template asks, or use rows of text"
        for reason, (first, *more) in failed.items()
    ]
    if problems:
        raise TaskError(problems)
    return ExampleSet(task, tuple(examples))
