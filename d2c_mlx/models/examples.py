"""Tokenized rows, on which losses are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from d2c_mlx.utils.files import fingerprint

__all__ = ["Example", "ExampleSet"]


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
        cuts: row numbers at which an evaluation may stop early.
        teacher: digest of the adapter whose predictions are the targets; empty for the rows' own.
        teacher_targets: per example `(n_targets, hidden + 1)` float32, the mean and the constant of
            its `distill.TeacherRow`; empty without a teacher.
    """

    task: str
    examples: tuple[Example, ...]
    cuts: tuple[int, ...] = ()
    teacher: str = ""
    teacher_targets: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def parts(self) -> tuple[ExampleSet, ...]:
        """The rows between two cuts, each part evaluated as a whole.

        Each part has a cache entry of its own, also when early stopping is off (`--without bound`).
        So early stopping changes no bit. Sets without cuts are evaluated whole, which is faster.
        """
        if not self.cuts:
            return (self,)
        bounds = (0, *self.cuts, len(self.examples))
        return tuple(
            replace(
                self,
                examples=self.examples[i:j],
                teacher_targets=self.teacher_targets[i:j],
                cuts=(),
            )
            for i, j in zip(bounds, bounds[1:])
        )

    def cut(self, *shares: float) -> ExampleSet:
        """The same set with cuts after these shares of its rows, rounded up.

        At least two rows are before the first and after the last cut: a single row costs too much.
        """
        n = len(self.examples)
        cuts = sorted({max(2, math.ceil(share * n)) for share in shares})
        return replace(self, cuts=tuple(cut for cut in cuts if cut <= n - 2))

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
