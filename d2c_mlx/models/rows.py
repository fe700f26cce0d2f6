"""Rows of a JSONL file in mlx-lm's formats, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2c_mlx.utils.errors import TaskError
from d2c_mlx.utils.files import read_text
from d2c_mlx.utils.parsing import parse_json

__all__ = ["Row", "messages_problem", "prompt_key", "read_lines", "read_rows", "row_format"]

Row = dict[str, Any]
# Most bytes of a file of rows, of which the first ten decide.
_MOST_ROWS = 256 << 20
_FORMATS = (("prompt", "completion"), ("messages",), ("text",))
_FORMAT_EXAMPLE = 'such as {"prompt": "...", "completion": "..."}'
_EXPECTED = 'expected "prompt" and "completion", or "messages", or "text" (mlx-lm\'s formats)'


def prompt_key(row: Row) -> str:
    """A key of the row's prompt, equal for "prompt" and for "messages" that say the same."""
    keys = row_format(row)
    if keys == ("text",):
        return str(row["text"]).strip()
    messages = [{"role": "user", "content": row.get("prompt", "")}]
    if keys == ("messages",):
        messages = row["messages"][:-1]
    said = [(one["role"], one["content"].strip()) for one in messages]
    return json.dumps([one for one in said if one[1]], ensure_ascii=False)


def read_rows(path: Path, hint: str) -> dict[int, Row]:
    """Read a JSONL file of rows: line number -> row, all of one format.

    Args:
        path: the file.
        hint: end of the message if there is no such file.

    Raises:
        TaskError: the problems of all lines.
    """
    rows = read_lines(path, hint, _row_problem)
    formats = {row_format(row) for row in rows.values()}
    if len(formats) > 1:
        raise TaskError(f"{path}: mixes row formats {sorted(map(str, formats))}; use one per file")
    return rows


def read_lines(
    path: Path, hint: str, row_problem: Callable[[object], str | None]
) -> dict[int, Row]:
    """Read the objects of a JSONL file: line number -> row.

    Args:
        path: a JSONL file.
        hint: end of the message if there is no such file.
        row_problem: gives what is wrong with one row, or None.

    Raises:
        TaskError: no file, or the problems of all lines.
    """
    if path.is_dir():
        raise TaskError(f"{path}: a directory, expected a JSONL file of rows")
    if not path.is_file():
        raise TaskError(f"{path}: missing; {hint}")
    try:
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        lines = read_text(path, _MOST_ROWS).split("\n")
    except OSError as error:
        raise TaskError(
            f"{path}: cannot be read ({error.strerror}); expected rows of JSON"
        ) from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows: dict[int, Row] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: not JSON ({error})")
            continue
        problem = row_problem(row)
        if problem:
            problems.append(f"{path}:{number}: {problem}")
        rows[number] = row
    if problems:
        raise TaskError(problems)
    if not rows:
        raise TaskError(
            f"{path}: empty; expected one JSON object per line, {_FORMAT_EXAMPLE};"
            " docs/reference/topics.md tells ways to get them"
        )
    return rows


def row_format(row: Row) -> tuple[str, ...] | None:
    """The keys that make a row one of mlx-lm's formats, in mlx-lm's order of preference."""
    return next((keys for keys in _FORMATS if all(key in row for key in keys)), None)


def _row_problem(row: object) -> str | None:
    """Describe what is wrong with one row; None if nothing is."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    keys = row_format(row)
    if keys is None:
        return f"found the keys {sorted(row)}, {_EXPECTED}"
    if keys != ("messages",):
        bad = next((key for key in keys if not isinstance(row[key], str) or not row[key]), None)
        return f'"{bad}" must be a non-empty string' if bad else None
    return messages_problem(row["messages"], "assistant")


def messages_problem(messages: Any, last: str) -> str | None:  # noqa: ANN401  as JSON gave it
    """Describe what is wrong with a row's "messages"; the last one must have the role `last`."""
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not good or any("role" not in m or not isinstance(m.get("content"), str) for m in messages):
        return '"messages" must be a list of objects with "role" and "content"'
    if not all(isinstance(m["role"], str) for m in messages):
        return '"role" must be a string'
    role = messages[-1]["role"]
    return None if role == last else f'the last message has role {role!r}, expected "{last}"'
