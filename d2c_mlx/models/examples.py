"""Tokenized rows, on which losses are measured; rows become tokens as in mlx-lm's trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
from jinja2 import TemplateError
from mlx_lm.tuner.datasets import create_dataset

from d2c_mlx.models.rows import Row, row_format
from d2c_mlx.utils.errors import TaskError
from d2c_mlx.utils.files import fingerprint

# Errors of tokenizers and of strangers' templates; a text without a token gives an IndexError.
_UNTOKENIZED = (ValueError, TypeError, LookupError, AttributeError, TemplateError)


@dataclass(frozen=True)
class Example:
    """Token ids of one row; `tokens[offset:]` are the targets that count in the loss.

    Attributes:
        tokens: token ids of prompt and answer.
        offset: length of the prompt, as mlx-lm's trainer masks it.
        prompt: the prompt that a model answers, where that is not `tokens[:offset]`. Templates may
            open a thought for the model, or leave one out of the answers that they are given.
    """

    tokens: tuple[int, ...]
    offset: int
    prompt: tuple[int, ...] | None = None

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The prompt that a model answers; empty for rows of text."""
        return self.tokens[: self.offset] if self.prompt is None else self.prompt

    @property
    def first_target(self) -> int:
        """Index of the first token that counts in the loss; nothing predicts token 0."""
        return max(self.offset, 1)

    @property
    def n_targets(self) -> int:
        """Number of tokens that count in the loss."""
        return len(self.tokens) - self.first_target


@dataclass(frozen=True)
class ExampleSet:
    """The tokenized calibration or held-out rows of one task.

    Attributes:
        task: the task's name.
        examples: one per row.
        cuts: row numbers that divide the rows into `parts`.
        teacher: digest of the adapter whose predictions are the targets; empty for the rows' own.
        teacher_targets: the `targets` of each example's `distill.TeacherRow`; empty without a
            teacher.
    """

    task: str
    examples: tuple[Example, ...]
    cuts: tuple[int, ...] = ()
    teacher: str = ""
    teacher_targets: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def parts(self) -> tuple[Self, ...]:
        """The rows between two cuts; the set itself without cuts. See `Scorer.losses`."""
        if not self.cuts:
            return (self,)
        bounds = (0, *self.cuts, len(self.examples))
        slices = [slice(i, j) for i, j in zip(bounds, bounds[1:])]
        return tuple(
            replace(
                self, examples=self.examples[s], teacher_targets=self.teacher_targets[s], cuts=()
            )
            for s in slices
        )

    def halved(self) -> Self:
        """The same set in two parts, so that one adapter on one task keeps two cores busy.

        Each part has at least two rows: a single row costs too much.
        """
        n = len(self.examples)
        return replace(self, cuts=(-(-n // 2),) if n >= 4 else ())

    def first(self, n: int, cuts: Sequence[int]) -> Self:
        """The first `n` rows, cut where these have two rows or more on both sides."""
        rows = self.examples[:n]
        return replace(self, examples=rows, cuts=tuple(cut for cut in cuts if cut < len(rows) - 1))

    @property
    def n_targets(self) -> int:
        """Number of target tokens."""
        return sum(example.n_targets for example in self.examples)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, prompts included; an evaluation costs about in proportion."""
        return sum(len(example.tokens) for example in self.examples)

    @cached_property
    def tokens_digest(self) -> str:
        """Hex SHA-256 of the token ids and offsets."""
        return fingerprint([[example.tokens, example.offset] for example in self.examples])

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the token ids and offsets, and of the teacher."""
        tokens = self.tokens_digest
        return fingerprint([tokens, self.teacher]) if self.teacher else tokens


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


def encode(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    task: str,
    rows: Sequence[Row],
    context: int | None = None,
) -> ExampleSet:
    """Tokenize rows with mlx-lm's own dataset classes, prompts masked.

    Args:
        tokenizer: the model's tokenizer.
        task: name of the set.
        rows: rows of one format; one without a place is named by task and number.
        context: most tokens of a row; None sets no limit.

    Raises:
        TaskError: every row that the chat template refuses, that has no target token or is too
            long.
    """
    examples: list[Example] = []
    problems: list[str] = []
    # Reason -> places: without a chat template every row fails, for one.
    failed: dict[str, list[str]] = {}
    for i, row in enumerate(rows, 1):
        place = getattr(row, "place", "") or f"task {task}: row {i}"
        options = SimpleNamespace(mask_prompt=row_format(row) != ("text",))
        try:
            tokens, offset = create_dataset([row], tokenizer, options).process(row)
            asked = _prompt_of(tokenizer, row)
        except _UNTOKENIZED as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed.setdefault(reason, []).append(place)
            continue
        example = Example(tuple(map(int, tokens)), int(offset))
        same = asked == example.prompt_tokens
        examples.append(example if same else replace(example, prompt=asked))
        n = len(example.tokens)
        if example.n_targets < 1:
            problems.append(
                f"{place} has no target token: found {n:,} tokens, expected more than the"
                f" {example.first_target:,} that are given; complete the row or remove it"
            )
        elif context and n > context:
            problems.append(
                f"{place} has {n:,} tokens, expected at most {context:,}, the model's context"
            )
    remedy = "change it as the model's chat template asks"
    if not tokenizer.chat_template:
        remedy = "the model has no chat template: put a chat_template.jinja beside its weights"
    for reason, (first, *more) in failed.items():
        others = f", nor {len(more)} rows more" if more else ""
        problems.append(
            f"{first}: mlx-lm cannot tokenize it{others} ({reason}); {remedy}, or use rows of text"
        )
    if problems:
        raise TaskError(problems)
    return ExampleSet(task, tuple(examples))


def _prompt_of(
    tokenizer: Any,  # noqa: ANN401  mlx-lm's
    row: Mapping[str, Any],
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
