"""Tokenized rows: what losses are measured on."""

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
        tokens: of prompt and answer.
        offset: as mlx-lm's trainer masks: how long the prompt is.
        prompt: what a model is asked with where that is not `tokens[:offset]`. Templates may open a
            thought for the model, or leave one out of the answers that they are given.
    """

    tokens: tuple[int, ...]
    offset: int
    prompt: tuple[int, ...] | None = None

    @property
    def asked(self) -> tuple[int, ...]:
        """What a model is asked with; nothing in rows of text."""
        return self.tokens[: self.offset] if self.prompt is None else self.prompt

    @property
    def first_target(self) -> int:
        """Index of the first token that is predicted; nothing predicts token 0."""
        return max(self.offset, 1)

    @property
    def n_targets(self) -> int:
        """Number of tokens that count in the loss."""
        return len(self.tokens) - self.first_target


@dataclass(frozen=True)
class ExampleSet:
    """The tokenized probe or test examples of one task.

    Attributes:
        task: its name.
        examples: one per row.
        cuts: row numbers at which an evaluation may stop early.
        teacher: digest of the adapter whose answers are the targets; empty: those of the rows.
        expected: of every example what the teacher says, `(n_targets, hidden + 1)` in float32: see
            `Distiller.taught`.
    """

    task: str
    examples: tuple[Example, ...]
    cuts: tuple[int, ...] = ()
    teacher: str = ""
    expected: tuple[np.ndarray, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def parts(self) -> tuple[ExampleSet, ...]:
        """What is evaluated as a whole: the rows between two cuts."""
        if not self.cuts:
            return (self,)
        bounds = (0, *self.cuts, len(self.examples))
        return tuple(
            replace(self, examples=self.examples[i:j], expected=self.expected[i:j], cuts=())
            for i, j in zip(bounds, bounds[1:])
        )

    def cut(self, *shares: float) -> ExampleSet:
        """The same set with cuts after these shares of its rows, rounded up.

        Two rows at least before the first and after the last cut: a single row costs too much.
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
        """Number of tokens, prompts included: what an evaluation costs."""
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
