"""Rows of a JSONL file in mlx-lm's formats, and what is wrong with them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from d2c_mlx.utils.errors import TaskError
from d2c_mlx.utils.files import read_text, write_text
from d2c_mlx.utils.parsing import parse_json

# Most bytes of a file of rows, of which the first ten decide.
_MOST_ROWS = 256 << 20
_FORMATS = (("prompt", "completion"), ("messages",), ("text",))
_EXPECTED = 'expected "prompt" and "completion", or "messages", or "text" (mlx-lm\'s formats)'


class Row(dict[str, Any]):
    """One row: what mlx-lm's dataset classes take.

    Attributes:
        place: file and line, for messages; empty of a row that is in no file.
    """

    place = ""


def prompt_key(row: Row) -> str:
    """A key of the row's prompt, equal for "prompt" and for "messages" that say the same."""
    keys = row_format(row)
    if keys == ("text",):
        return str(row["text"]).strip()
    messages = [{"role": "user", "content": row.get("prompt", "")}]
    if keys == ("messages",):
        messages = row["messages"] if is_prompt(row) else row["messages"][:-1]
    texts = [(message["role"], message["content"].strip()) for message in messages]
    return json.dumps([(role, text) for role, text in texts if text], ensure_ascii=False)


def is_prompt(row: Row) -> bool:
    """True if a row has no answer: no "completion", or "messages" that end with the user."""
    if row_format(row) == ("messages",):
        return bool(row["messages"][-1]["role"] == "user")
    return "prompt" in row and row_format(row) is None


def answered_row(row: Row, answer: str) -> Row:
    """A row that `is_prompt`, with an answer."""
    if "messages" not in row:
        answered = Row(row, completion=answer)
    else:
        turn = {"role": "assistant", "content": answer}
        answered = Row(row, messages=[*row["messages"], turn])
    answered.place = row.place
    return answered


def read_rows(path: Path, hint: str, prompts: bool = False) -> list[Row]:
    """Read a JSONL file of rows, all of one format.

    Args:
        path: the file.
        hint: end of the message if there is no such file.
        prompts: allow rows without an answer, see `is_prompt`.

    Raises:
        TaskError: the problems of all lines.
    """
    if path.is_dir():
        raise TaskError(f"{path}: a directory, expected a JSONL file of rows")
    if not path.is_file():
        raise TaskError(f"{path}: missing; {hint}")
    try:
        # Not splitlines(): U+2028 and its like are legal inside a JSON string.
        lines = read_text(path, _MOST_ROWS).split("\n")
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror}), expected rows") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    rows: list[Row] = []
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = parse_json(line)
            problem = _row_problem(content, prompts)
        except ValueError as error:
            problem = f"not JSON ({error})"
        if problem:
            problems.append(f"{path}:{number}: {problem}")
            continue
        rows.append(Row(content))
        rows[-1].place = f"{path}:{number}"
    if problems:
        raise TaskError(problems)
    if not rows:
        raise TaskError(
            f'{path}: empty; expected a JSON object per line, such as {{"prompt": "...",'
            ' "completion": "..."}; docs/reference/topics.md tells ways to get them'
        )
    formats = {row_format(answered_row(row, "?") if is_prompt(row) else row) for row in rows}
    if len(formats) > 1:
        raise TaskError(f"{path}: mixes row formats {sorted(map(str, formats))}; use one per file")
    return rows


def row_format(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The keys that make a row one of mlx-lm's formats, in mlx-lm's order of preference."""
    return next((keys for keys in _FORMATS if all(key in row for key in keys)), None)


def _row_problem(row: Any, prompts: bool) -> str | None:  # noqa: ANN401  as JSON gave it
    """Describe what is wrong with one row; None if nothing is."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    keys = row_format(row)
    if keys == ("messages",):
        turns = row["messages"] if isinstance(row["messages"], list) else []
        pairs = [(turn.get("role"), turn.get("content")) for turn in turns if type(turn) is dict]
        texts = [text for pair in pairs for text in pair if isinstance(text, str)]
        if not turns or len(texts) != 2 * len(turns):
            return '"messages" must be a list of objects with texts as "role" and "content"'
        role, last = turns[-1]["role"], ("assistant", "user") if prompts else ("assistant",)
        expected = " or ".join(f'"{name}"' for name in last)
        return None if role in last else f"the last message has role {role!r}, expected {expected}"
    if prompts and keys is None and "prompt" in row:
        keys = ("prompt",)
    if keys is None:
        return f"found the keys {sorted(row)}, {_EXPECTED}"
    bad = next((key for key in keys if not isinstance(row[key], str) or not row[key]), None)
    return f'"{bad}" must be a non-empty string' if bad else None


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a JSONL file of rows."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
