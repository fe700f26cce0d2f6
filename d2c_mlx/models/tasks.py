"""Tasks: calibration rows (`probe.jsonl`) that decide, held-out rows (`test.jsonl`) that judge."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.rows import (
    Row,
    messages_problem,
    prompt_key,
    read_lines,
    read_rows,
    row_format,
)
from d2c_mlx.utils.errors import InputError, TaskError, collect, gather

__all__ = [
    "Task",
    "TaskRows",
    "common_system",
    "encode_probes",
    "encode_tests",
    "load_task",
    "load_tasks",
    "load_unlabelled",
    "probe_file",
    "spare_tasks",
    "systems_of",
]

# Most names that a message lists, and most files with the same problem that have a line each.
_MOST_LISTED, _MOST_ALIKE = 8, 3


@dataclass(frozen=True)
class TaskRows:
    """Rows of `probe.jsonl` and `test.jsonl`, as mlx-lm's dataset classes take them.

    Attributes:
        name: the name of its directory, and of the adapter.
        probe: calibration rows, by which everything is decided.
        test: held-out rows, which only judge.
        probe_places: file and line of every row of `probe`, for messages.
        test_places: file and line of every row of `test`.
    """

    name: str
    probe: tuple[Row, ...]
    test: tuple[Row, ...]
    probe_places: tuple[str, ...] = field(default=(), compare=False, repr=False)
    test_places: tuple[str, ...] = field(default=(), compare=False, repr=False)


@dataclass(frozen=True)
class Task:
    """The rows of one adapter, tokenized once.

    Attributes:
        name: the adapter's name.
        calibration: rows by which everything is decided.
        held_out: rows which only judge.
        rows: the rows as read.
        extra: rows that merging and refining read beside the calibration rows, with the adapter's
            own answers; nothing is judged by them. None if there are none.
    """

    name: str
    calibration: ExampleSet
    held_out: ExampleSet
    rows: TaskRows
    extra: ExampleSet | None = None

    @property
    def calibration_and_extra(self) -> ExampleSet:
        """All rows that merging may read."""
        if self.extra is None:
            return self.calibration
        examples = self.calibration.examples + self.extra.examples
        return replace(self.calibration, examples=examples, cuts=())


def load_tasks(directory: Path, names: Iterable[str], tests: bool = True) -> list[TaskRows]:
    """Load the task of every adapter.

    Args:
        directory: holds a directory per task.
        names: names of the tasks, which are those of their adapters.
        tests: see `load_task`.

    Raises:
        InputError: the problems of all tasks, one line each.
    """
    if not directory.is_dir():
        raise TaskError(
            f"{directory}: no such directory; --tasks holds <adapter>/probe.jsonl, and d2c-mlx init"
            " DIR writes what is missing"
        )
    known = list(names)
    try:
        return gather(partial(_load_named, directory / name, known, tests) for name in known)
    except InputError as error:
        raise TaskError(_together(error.problems)) from None


def _together(problems: Iterable[str]) -> list[str]:
    """Problems, with one line where many files have the same one."""
    files: dict[str, list[str]] = {}
    for line in problems:
        file, _, problem = line.partition(": ")
        files.setdefault(problem, []).append(file)
    lines = []
    for problem, names in files.items():
        if len(names) > _MOST_ALIKE:
            names = [f"{', '.join(names[:_MOST_ALIKE])} and {len(names) - _MOST_ALIKE} files more"]
        lines += [f"{name}: {problem}" for name in names]
    return lines


def spare_tasks(directory: Path, names: Iterable[str]) -> list[str]:
    """Sorted folders with rows that are no task of `names`, such as one with a misspelt name."""
    found = {path.parent.name for path in directory.glob("*/*.jsonl") if path.parent.name[0] != "."}
    return sorted(found - set(names))


def _load_named(directory: Path, names: Sequence[str], tests: bool) -> TaskRows:
    """Load a task; where it has no folder, say which there are and how to name the adapter."""
    spare = [] if directory.is_dir() else spare_tasks(directory.parent, names)
    if not spare:
        return load_task(directory, tests)
    name = directory.name
    # One that is more like another adapter's name is not proposed for this one.
    close = [one for one in spare if difflib.get_close_matches(one, names, 1, 0.5) == [name]]
    listed = ", ".join(spare[:_MOST_LISTED]) + (", ..." if len(spare) > _MOST_LISTED else "")
    raise TaskError(
        f"{directory}: missing; found {listed}, which no adapter is called. Rename the folder, or"
        f" name the adapter after it: --adapters {close[0] if close else 'NAME'}=PATH/{name}"
    )


def probe_file(directory: Path) -> Path:
    """The calibration rows of a task: `probe.jsonl` or, without it, mlx-lm's `valid.jsonl`."""
    path, valid = directory / "probe.jsonl", directory / "valid.jsonl"
    return valid if valid.is_file() and not path.exists() else path


def load_task(directory: Path, tests: bool = True) -> TaskRows:
    """Load `probe.jsonl` and `test.jsonl` of one task; they must share no prompt.

    Without `probe.jsonl` the rows of mlx-lm's `valid.jsonl` are the calibration rows.

    Args:
        directory: the task's directory.
        tests: False leaves `test.jsonl` unread, for callers that judge nothing.

    Raises:
        TaskError: the problems of both files.
    """
    errors: list[InputError] = []
    probes, tested = probe_file(directory), directory / "test.jsonl"
    hint = f"every adapter needs its task's probe.jsonl{', test.jsonl' if tests else ''}"
    if (directory / "train.jsonl").is_file():
        hint += f"; d2c-mlx tasks split {directory / 'train.jsonl'} --output DIR makes them"
    probe = collect(errors, partial(read_rows, probes, hint)) or {}
    test = collect(errors, partial(read_rows, tested, hint)) or {} if tests else {}
    problems = [line for error in errors for line in error.problems]
    prompts = {prompt_key(row) for row in probe.values()}
    shared = [number for number, row in test.items() if prompt_key(row) in prompts]
    if shared:
        problems.append(
            f"{tested}:{shared[0]}: this prompt is in {probes.name} too ({len(shared)} such rows);"
            " probe and test must be disjoint: remove them from one"
        )
    if problems:
        raise TaskError(problems)
    return TaskRows(
        directory.name, tuple(probe.values()), tuple(test.values()),
        _places(probes, probe), _places(tested, test),
    )  # fmt: skip


def _places(path: Path, lines: Iterable[int]) -> tuple[str, ...]:
    """File, line and row number of every row; options count rows, editors count lines."""
    return tuple(f"{path}: line {line} (row {i})" for i, line in enumerate(lines, 1))


def common_system(tasks: Iterable[TaskRows]) -> str | None:
    """The system message that all calibration rows of all tasks begin with; None if they differ."""
    first = [row["messages"][0] if row_format(row) == ("messages",) else {}
             for task in tasks for row in task.probe]  # fmt: skip
    said = {one.get("content") if one.get("role") == "system" else None for one in first}
    return said.pop() if len(said) == 1 else None


def systems_of(tasks: Iterable[TaskRows]) -> dict[str, str]:
    """TaskRows -> its `common_system`, without tasks that have none."""
    found = {task.name: common_system([task]) for task in tasks}
    return {name: system for name, system in found.items() if system is not None}


def load_unlabelled(path: Path, tasks: Sequence[TaskRows], n_probe: int) -> dict[str, list[Row]]:
    """Load prompts without answers: lines of `{"task": NAME, "prompt": ...}` or with "messages".

    Two kinds of prompts are refused. A prompt of a held-out row, of any task, would leak into
    training. A prompt of a calibration row that is used could no longer be held back.

    Args:
        path: a JSONL file.
        tasks: tasks that may be named; their rows may be missing.
        n_probe: number of calibration rows of each task that are used.

    Returns:
        TaskRows name -> rows in mlx-lm's chat format, each with a stand-in for the answer.

    Raises:
        TaskError: the problems of all lines.
    """
    known = {task.name: task for task in tasks}
    probes = {task.name: {prompt_key(row) for row in task.probe[:n_probe]} for task in tasks}
    tests = {prompt_key(row): task.name for task in tasks for row in task.test}

    def problem(row: object) -> str | None:
        bad = _unlabelled_problem(row, known)
        if bad or not isinstance(row, dict):
            return bad
        prompt = prompt_key(_with_answer(row))
        if prompt in tests:
            return f"this prompt is in test.jsonl of {tests[prompt]}, which only judges: remove it"
        if prompt in probes[row["task"]]:
            return f"this prompt is in probe.jsonl of {row['task']} and used from there: remove it"
        return None

    found: dict[str, list[Row]] = {}
    for row in read_lines(path, "--unlabelled names a JSONL file", problem).values():
        found.setdefault(row["task"], []).append(_with_answer(row))
    return found


def _unlabelled_problem(row: object, known: Mapping[str, TaskRows]) -> str | None:
    if not isinstance(row, dict):
        return f"expected a JSON object, found {type(row).__name__}"
    if row.get("task") not in list(known):
        return f'"task" is {row.get("task")!r}, expected an adapter: {", ".join(sorted(known))}'
    if ("text",) in map(row_format, known[row["task"]].probe[:1]):
        return f"the rows of {row['task']} are texts, which have no prompts"
    if row.get("messages") is None:
        good = isinstance(row.get("prompt"), str) and row["prompt"]
        return None if good else 'expected a non-empty string "prompt", or "messages"'
    return messages_problem(row["messages"], "user")


def _with_answer(row: Row) -> Row:
    prompt = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"messages": [*prompt, {"role": "assistant", "content": "?"}], **tools}


# `encode` of one model: name of the set, its rows, and where each stands.
Encode = Callable[[str, Sequence[Row], Sequence[str]], ExampleSet]


def encode_probes(encode: Encode, tasks: Iterable[TaskRows], n: int | None) -> list[ExampleSet]:
    """Tokenize the first `n` calibration rows of every task, or all.

    Args:
        encode: tokenizes rows, see `BaseModel.encode`.
        tasks: tasks whose `probe` is read.
        n: rows per task; None takes all.

    Raises:
        TaskError: the problems of all rows.
    """
    return gather(partial(encode, one.name, one.probe[:n], one.probe_places) for one in tasks)


def encode_tests(encode: Encode, tasks: Iterable[TaskRows], n: int | None) -> list[ExampleSet]:
    """Tokenize the first `n` held-out rows of every task, or all; else as `encode_probes`."""
    return gather(partial(encode, one.name, one.test[:n], one.test_places) for one in tasks)
