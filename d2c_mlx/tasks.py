"""Tasks: a few probe examples that decide, and held-out test examples that judge."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from d2c_mlx.errors import InputError, TaskError, collect, gather
from d2c_mlx.files import fingerprint

__all__ = ["Example", "ExampleSet", "Row", "Task", "load_task", "load_tasks", "row_format"]

Row = dict[str, Any]
_FORMATS = (("prompt", "completion"), ("messages",), ("text",))
_EXPECTED = 'expected "prompt" and "completion", or "messages", or "text" (mlx-lm\'s formats)'


@dataclass(frozen=True)
class Example:
    """Token ids of one row; `tokens[offset:]` are the targets that count in the loss."""

    tokens: tuple[int, ...]
    offset: int

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
    """

    task: str
    examples: tuple[Example, ...]
    cuts: tuple[int, ...] = ()

    @cached_property
    def parts(self) -> tuple[ExampleSet, ...]:
        """What is evaluated as a whole: the rows between two cuts."""
        if not self.cuts:
            return (self,)
        bounds = (0, *self.cuts, len(self.examples))
        return tuple(
            ExampleSet(self.task, self.examples[start:stop])
            for start, stop in zip(bounds, bounds[1:])
        )

    def cut(self, *shares: float) -> ExampleSet:
        """The same set with cuts after these shares of its rows, rounded up.

        Two rows at least before the first and after the last cut: a single row costs too much.
        """
        n = len(self.examples)
        cuts = sorted({max(2, math.ceil(share * n)) for share in shares})
        return ExampleSet(self.task, self.examples, tuple(cut for cut in cuts if cut <= n - 2))

    @property
    def n_targets(self) -> int:
        """Number of target tokens."""
        return sum(example.n_targets for example in self.examples)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, prompts included: what an evaluation costs."""
        return sum(len(example.tokens) for example in self.examples)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the token ids and offsets."""
        return fingerprint([[example.tokens, example.offset] for example in self.examples])


@dataclass(frozen=True)
class Task:
    """Rows of `probe.jsonl` and `test.jsonl`, as mlx-lm's dataset classes take them."""

    name: str
    probe: tuple[Row, ...]
    test: tuple[Row, ...]


def load_tasks(directory: Path, names: Iterable[str]) -> list[Task]:
    """Load the task of every adapter name.

    Raises:
        InputError: the problems of all tasks, one line each.
    """
    if not directory.is_dir():
        raise TaskError(f"{directory}: no such directory; --tasks holds <adapter>/probe.jsonl")
    return gather(partial(load_task, directory / name) for name in names)


def load_task(directory: Path) -> Task:
    """Load `probe.jsonl` and `test.jsonl` of one task; they must share no prompt."""
    errors: list[InputError] = []
    probe = collect(errors, lambda: _load_rows(directory / "probe.jsonl")) or {}
    test = collect(errors, lambda: _load_rows(directory / "test.jsonl")) or {}
    problems = [line for error in errors for line in error.problems]
    prompts = {_prompt(row) for row in probe.values()}
    shared = [number for number, row in test.items() if _prompt(row) in prompts]
    if shared:
        problems.append(
            f"{directory / 'test.jsonl'}:{shared[0]}: this prompt is in probe.jsonl too"
            f" ({len(shared)} such rows); probe and test must be disjoint: remove them from one"
        )
    if problems:
        raise TaskError(problems)
    return Task(directory.name, tuple(probe.values()), tuple(test.values()))


def _prompt(row: Row) -> str:
    keys = row_format(row)
    if keys == ("messages",):
        return json.dumps(row["messages"][:-1], sort_keys=True, ensure_ascii=False)
    return str(row[keys[0]]).strip() if keys else ""


def _load_rows(path: Path) -> dict[int, Row]:
    """Line number -> row."""
    if not path.is_file():
        raise TaskError(f"{path}: missing; every adapter needs its task's probe.jsonl, test.jsonl")
    try:
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows: dict[int, Row] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: not JSON ({error})")
            continue
        problem = _row_problem(row)
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        rows[number] = row
    if problems:
        raise TaskError(problems)
    if not rows:
        raise TaskError(f"{path}: empty; expected one JSON object per line")
    formats = {row_format(row) for row in rows.values()}
    if len(formats) > 1:
        raise TaskError(f"{path}: mixes row formats {sorted(map(str, formats))}; use one per file")
    return rows


def row_format(row: Row) -> tuple[str, ...] | None:
    """The keys that make a row one of mlx-lm's formats, in mlx-lm's order of preference."""
    return next((keys for keys in _FORMATS if all(key in row for key in keys)), None)


def _row_problem(row: object) -> str | None:
    """What is wrong with one row, or None."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    keys = row_format(row)
    if keys is None:
        return f"found the keys {sorted(row)}, {_EXPECTED}"
    if keys != ("messages",):
        bad = next((key for key in keys if not isinstance(row[key], str) or not row[key]), None)
        return f'"{bad}" must be a non-empty string' if bad else None
    messages = row["messages"]
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not good or any("role" not in m or not isinstance(m.get("content"), str) for m in messages):
        return '"messages" must be a list of objects with "role" and "content"'
    if messages[-1]["role"] != "assistant":
        return f'the last message has role {messages[-1]["role"]!r}, expected "assistant"'
    return None
