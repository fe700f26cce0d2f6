"""Tokenizing rows and prompts, as mlx-lm's trainer does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError
from mlx_lm.tuner.datasets import create_dataset

from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.rows import Row, row_format
from d2c_mlx.models.tasks import Task
from d2c_mlx.utils.errors import TaskError, gather, warn

__all__ = ["context_length", "encode", "encode_probes", "encode_prompts", "encode_tests"]

# `encode` of one model: name of the set, its rows, and where each stands.
Encode = Callable[[str, Sequence[Row], Sequence[str]], ExampleSet]

# Errors of tokenizers and of strangers' templates; a text without a token gives an IndexError.
_UNTOKENIZED = (ValueError, TypeError, LookupError, AttributeError, TemplateError)


def context_length(args: Any) -> int | None:  # noqa: ANN401  mlx-lm's, of any architecture
    """The model's context length, in tokens of prompt and answer; None if it does not say.

    Args:
        args: `args` of an mlx-lm model, or the content of its config.json. Models that take images
            keep those of the language model in `text_config`.
    """
    if args is None:
        return None
    get = args.get if isinstance(args, dict) else partial(getattr, args)
    context = get("max_position_embeddings", None)
    return context if isinstance(context, int) else context_length(get("text_config", None))


def encode_probes(encode: Encode, tasks: Iterable[Task], n: int | None) -> list[ExampleSet]:
    """Tokenize the first `n` calibration rows of every task, or all.

    Args:
        encode: tokenizes rows, see `BaseModel.encode`.
        tasks: tasks whose `probe` is read.
        n: rows per task; None takes all.

    Raises:
        TaskError: the problems of all rows.
    """
    return gather(partial(encode, one.name, one.probe[:n], one.probe_places) for one in tasks)


def encode_tests(encode: Encode, tasks: Iterable[Task], n: int | None) -> list[ExampleSet]:
    """Tokenize the first `n` held-out rows of every task, or all; else as `encode_probes`."""
    return gather(partial(encode, one.name, one.test[:n], one.test_places) for one in tasks)


def encode(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    task: str,
    rows: Sequence[Row],
    places: Sequence[str] = (),
    context: int | None = None,
) -> ExampleSet:
    """Tokenize rows with mlx-lm's own dataset classes, prompts masked.

    Use `encode_prompts` for prompts without an answer.

    Args:
        tokenizer: the model's tokenizer.
        task: name of the set.
        rows: rows of one format.
        places: file and line of every row, and maybe of more, for messages; without them rows are
            named by task and number.
        context: most tokens of a row; None sets no limit.

    Raises:
        TaskError: every row that the chat template refuses, that has no target token or is too
            long.
    """
    examples: list[Example] = []
    problems: list[str] = []
    failed: dict[str, list[str]] = {}
    for row, place in zip(rows, places or [f"task {task}: row {i + 1}" for i in range(len(rows))]):
        try:
            examples.append(_example(tokenizer, row))
        except _UNTOKENIZED as error:
            failed.setdefault(_reason(error), []).append(place)
            continue
        problems += _of_wrong_length(examples[-1], place, context)
    problems += _not_tokenized(tokenizer, failed)
    if problems:
        raise TaskError(problems)
    if any(one.prompt is not None for one in examples):
        warn(
            "tasks: the model's chat template ends a prompt with tokens that no finished"
            " conversation has, so mlx-lm's trainer, and losses here, leave out as many tokens of"
            " each answer; answers are asked with the whole prompt"
        )
    return ExampleSet(task, tuple(examples))


def encode_prompts(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    prompts: Sequence[str],
    system: str | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of prompts that have no answer yet, the chat template applied.

    Args:
        tokenizer: the model's tokenizer.
        prompts: user messages, one per prompt.
        system: system message before each; None leaves it to the template.

    Raises:
        InputError: the chat template refuses a prompt.
    """
    before = [] if system is None else [{"role": "system", "content": system}]
    answer = {"role": "assistant", "content": ""}

    def tokens_of(prompt: str) -> tuple[int, ...]:
        try:
            messages = [*before, {"role": "user", "content": prompt}, answer]
            return _prompt_of(tokenizer, {"messages": messages})
        except _UNTOKENIZED as error:
            raise TaskError(
                f"prompt {prompt[:40]!r}: mlx-lm cannot tokenize it ({_reason(error)}); change it"
                " as the model's chat template asks"
            ) from None

    return gather(partial(tokens_of, prompt) for prompt in prompts)


def _example(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    row: Row,
) -> Example:
    options = SimpleNamespace(mask_prompt=row_format(row) != ("text",))
    tokens, offset = create_dataset([row], tokenizer, options).process(row)
    asked = _prompt_of(tokenizer, row)
    one = Example(tuple(map(int, tokens)), int(offset))
    return one if asked == one.prompt_tokens else replace(one, prompt=asked)


def _of_wrong_length(one: Example, place: str, context: int | None) -> Iterable[str]:
    if one.n_targets < 1:
        yield (
            f"{place} has no target token: found {len(one.tokens):,} tokens, expected more than"
            f" the {one.first_target:,} that are given; complete the row or remove it"
        )
    elif context and len(one.tokens) > context:
        yield (
            f"{place} has {len(one.tokens):,} tokens, more than the model's context of"
            f" {context:,}; shorten it"
        )


def _not_tokenized(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    failed: dict[str, list[str]],
) -> list[str]:
    """A line for every reason: without a chat template every row fails, for one."""
    remedy = (
        "change it as the model's chat template asks" if tokenizer.chat_template
        else "the model has no chat template: put a chat_template.jinja beside its weights"
    )  # fmt: skip
    return [
        f"{first}: mlx-lm cannot tokenize it{f', nor {len(more)} rows more' if more else ''}"
        f" ({reason}); {remedy}, or use rows of text"
        for reason, (first, *more) in failed.items()
    ]


def _prompt_of(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    row: Row,
) -> tuple[int, ...]:
    """The prompt of a row as `mlx_lm.generate` and a server build it; empty for rows of text."""
    if row_format(row) == ("text",):
        return ()
    messages, opens = [{"role": "user", "content": row.get("prompt")}], True
    if row_format(row) == ("messages",):
        messages, last = row["messages"][:-1], row["messages"][-1]
        opens = last.get("role") == "assistant"  # as mlx-lm's ChatDataset
    tokens = tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), add_generation_prompt=opens, return_dict=False
    )
    return tuple(map(int, tokens))


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
