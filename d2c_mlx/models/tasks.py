"""Tasks: calibration rows (`probe.jsonl`) that decide, held-out rows (`test.jsonl`) that judge."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.rows import Row, answered_row, is_prompt, prompt_key, read_rows, row_format
from d2c_mlx.utils.errors import InputError, TaskError, collect, gather

__all__ = [
    "Task",
    "TaskRows",
    "common_system",
    "encode_probes",
    "encode_task",
    "encode_tests",
    "load_task",
    "load_tasks",
    "probe_file",
    "spare_tasks",
    "systems_of",
    "with_answers",
]

# Most names that a message lists, and most files with the same problem that have a line each.
_MOST_LISTED, _MOST_ALIKE = 8, 3


# `encode` of one model: name of the set, its rows, and where each stands.
Encode = Callable[[str, Sequence[Row], Sequence[str]], ExampleSet]


@dataclass(frozen=True)
class TaskRows:
    """Rows of `probe.jsonl` and `test.jsonl`, as mlx-lm's dataset classes take them.

    Attributes:
        name: the name of its directory, and of the adapter.
        probe: calibration rows, by which everything is decided.
        test: held-out rows, which only judge.
        probe_places: file and line of every row of `probe`, for messages.
        test_places: file and line of every row of `test`.
        prompts: rows of `probe.jsonl` without an answer, which the adapter has to give. Where there
            is no other calibration row they become those; else they become `extra`.
        test_prompts: rows of `test.jsonl` without an answer; then no row there has one.
        extra: prompts beside `probe` with the adapter's answers.
    """

    name: str
    probe: tuple[Row, ...]
    test: tuple[Row, ...]
    probe_places: tuple[str, ...] = field(default=(), compare=False, repr=False)
    test_places: tuple[str, ...] = field(default=(), compare=False, repr=False)
    prompts: tuple[Row, ...] = ()
    test_prompts: tuple[Row, ...] = ()
    extra: tuple[Row, ...] = ()

    @property
    def asks(self) -> bool:
        """True if the adapter has to answer some of the rows."""
        return bool(self.prompts or self.test_prompts)

    def used(self, n_probe: int, n_test: int | None, extra: bool) -> TaskRows:
        """The rows that a run uses: the first of each kind.

        Args:
            n_probe: number of calibration rows.
            n_test: number of held-out rows; None is all.
            extra: True if something reads answers to prompts beside calibration rows.
        """
        prompts = (self.prompts if extra else ()) if self.probe else self.prompts[:n_probe]
        return replace(
            self,
            probe=self.probe[:n_probe],
            test=self.test[:n_test],
            prompts=prompts,
            test_prompts=self.test_prompts[:n_test],
        )


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
    def sets(self) -> list[ExampleSet]:
        """All rows that are evaluated: whole sets, and the parts in which they are measured."""
        sets = [self.calibration, self.held_out, *([self.extra] if self.extra else [])]
        return [part for rows in sets for part in (rows, *rows.parts)]

    @property
    def calibration_and_extra(self) -> ExampleSet:
        """All rows that merging may read."""
        if self.extra is None:
            return self.calibration
        examples = self.calibration.examples + self.extra.examples
        return replace(self.calibration, examples=examples, cuts=())


def encode_task(encode: Encode, rows: TaskRows) -> Task:
    """Tokenize the rows of a task; prompts get a stand-in until their adapter has answered.

    Args:
        encode: tokenizes rows, see `BaseModel.encode`.
        rows: the rows, see `TaskRows.used`.

    Raises:
        TaskError: the problems of all rows.
    """
    asked, asked_too = ([answered_row(row, "?") for row in prompts]
                        for prompts in (rows.prompts, rows.test_prompts))  # fmt: skip
    extra = [*rows.extra, *asked] if rows.probe else []
    calibration, held_out = gather([
        partial(encode, rows.name, rows.probe or asked, rows.probe_places),
        partial(encode, rows.name, rows.test or asked_too, rows.test_places),
    ])  # fmt: skip
    more = encode(rows.name, extra, ()) if extra else None
    return Task(rows.name, calibration.halved(), held_out.halved(), rows, more)


def with_answers(rows: TaskRows, directory: Path) -> TaskRows:
    """The rows with the answers that `make_rows.answer_prompts` wrote in place of the prompts."""

    def read(name: str, asked: bool) -> tuple[Row, ...]:
        # Of prompts beside other rows no answer may have ended.
        path = directory / name
        if not asked or not path.is_file() or not path.stat().st_size:
            return ()
        return tuple(read_rows(path, "run again").values())

    answered = read("probe.jsonl", bool(rows.prompts))
    judging = read("test.jsonl", bool(rows.test_prompts))
    own = bool(rows.probe)
    return TaskRows(
        rows.name,
        rows.probe or answered,
        rows.test or judging,
        rows.probe_places if own else (),
        rows.test_places if rows.test else (),
        extra=answered if own else (),
    )


def load_tasks(
    directory: Path, names: Iterable[str], tests: bool = True, prompts: bool = False
) -> list[TaskRows]:
    """Load the task of every adapter.

    Args:
        directory: holds a directory per task.
        names: names of the tasks, which are those of their adapters.
        tests: see `load_task`.
        prompts: see `load_task`.

    Raises:
        InputError: the problems of all tasks, one line each.
    """
    if not directory.is_dir():
        raise TaskError(
            f"{directory}: no such directory; --tasks holds <adapter>/probe.jsonl, and d2c-mlx init"
            " DIR writes what is missing"
        )
    names = list(names)
    try:
        return gather(
            partial(_load_named, directory / name, names, tests, prompts) for name in names
        )
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
    folders = {path.parent.name for path in directory.glob("*/*.jsonl")}
    return sorted(name for name in folders - set(names) if name[0] != ".")


def _load_named(directory: Path, names: Sequence[str], tests: bool, prompts: bool) -> TaskRows:
    """Load a task; where it has no folder, say which there are and how to name the adapter."""
    spare = [] if directory.is_dir() else spare_tasks(directory.parent, names)
    if not spare:
        return load_task(directory, tests, prompts)
    name = directory.name
    # One that is more like another adapter's name is not proposed for this one.
    close = [other for other in spare
             if difflib.get_close_matches(other, names, 1, 0.5) == [name]]  # fmt: skip
    listed = ", ".join(spare[:_MOST_LISTED]) + (", ..." if len(spare) > _MOST_LISTED else "")
    raise TaskError(
        f"{directory}: missing; found {listed}, which no adapter is called. Rename the folder, or"
        f" name the adapter after it: --adapters {close[0] if close else 'NAME'}=PATH/{name}"
    )


def probe_file(directory: Path) -> Path:
    """The calibration rows of a task: `probe.jsonl` or, without it, mlx-lm's `valid.jsonl`."""
    path, valid = directory / "probe.jsonl", directory / "valid.jsonl"
    return valid if valid.is_file() and not path.exists() else path


def load_task(directory: Path, tests: bool = True, prompts: bool = False) -> TaskRows:
    """Load `probe.jsonl` and `test.jsonl` of one task; they must share no prompt.

    Without `probe.jsonl` the rows of mlx-lm's `valid.jsonl` are the calibration rows.

    Args:
        directory: the task's directory.
        tests: False leaves `test.jsonl` unread, for callers that judge nothing.
        prompts: allow rows without an answer, see `rows.is_prompt`.

    Raises:
        TaskError: the problems of both files.
    """
    errors: list[InputError] = []
    probes, tested = probe_file(directory), directory / "test.jsonl"
    hint = f"every adapter needs its task's probe.jsonl{', test.jsonl' if tests else ''}"
    if (directory / "train.jsonl").is_file():
        hint += f"; d2c-mlx tasks split {directory / 'train.jsonl'} --output DIR makes them"
    probe = collect(errors, partial(read_rows, probes, hint, prompts)) or {}
    test = collect(errors, partial(read_rows, tested, hint, prompts)) or {} if tests else {}
    problems = [line for error in errors for line in error.problems]
    keys = {prompt_key(row) for row in probe.values()}
    shared = [number for number, row in test.items() if prompt_key(row) in keys]
    if shared:
        problems.append(
            f"{tested}:{shared[0]}: this prompt is in {probes.name} too ({len(shared)} such rows);"
            " probe and test must be disjoint: remove them from one"
        )
    asked = [number for number, row in test.items() if is_prompt(row)]
    if asked and len(asked) < len(test):
        problems.append(
            f"{tested}:{asked[0]}: has no answer, as {len(asked)} of {len(test)} rows; expected an"
            " answer in all of them or in none, which the adapter then gives"
        )
    if problems:
        raise TaskError(problems)
    answered = {number: row for number, row in probe.items() if not is_prompt(row)}
    own = {prompt_key(row) for row in answered.values()}
    prompts_of = {prompt_key(row): row for row in probe.values() if prompt_key(row) not in own}
    return TaskRows(
        directory.name,
        tuple(answered.values()),
        () if asked else tuple(test.values()),
        _places(probes, answered),
        () if asked else _places(tested, test),
        tuple(prompts_of.values()),
        tuple(test.values()) if asked else (),
    )


def _places(path: Path, lines: Iterable[int]) -> tuple[str, ...]:
    """File, line and row number of every row; options count rows, editors count lines."""
    return tuple(f"{path}: line {line} (row {i})" for i, line in enumerate(lines, 1))


def common_system(tasks: Iterable[TaskRows]) -> str | None:
    """The system message that all calibration rows of all tasks begin with; None if they differ."""
    first = [row["messages"][0] if row_format(row) == ("messages",) else {}
             for task in tasks for row in task.probe or task.prompts]  # fmt: skip
    systems = {message.get("content") if message.get("role") == "system" else None
               for message in first}  # fmt: skip
    return systems.pop() if len(systems) == 1 else None


def systems_of(tasks: Iterable[TaskRows]) -> dict[str, str]:
    """Task -> its `common_system`, without tasks that have none."""
    systems = {task.name: common_system([task]) for task in tasks}
    return {name: system for name, system in systems.items() if system is not None}


def encode_probes(encode: Encode, tasks: Iterable[TaskRows], n: int | None) -> list[ExampleSet]:
    """Tokenize the first `n` calibration rows of every task, or all.

    Args:
        encode: tokenizes rows, see `BaseModel.encode`.
        tasks: tasks whose `probe` is read.
        n: rows per task; None takes all.

    Raises:
        TaskError: the problems of all rows.
    """
    return gather(partial(encode, task.name, task.probe[:n], task.probe_places) for task in tasks)


def encode_tests(encode: Encode, tasks: Iterable[TaskRows], n: int | None) -> list[ExampleSet]:
    """Tokenize the first `n` held-out rows of every task, or all; else as `encode_probes`."""
    return gather(partial(encode, task.name, task.test[:n], task.test_places) for task in tasks)
