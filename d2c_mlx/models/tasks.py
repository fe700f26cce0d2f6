"""Tasks: calibration rows (`probe.jsonl`) that decide, held-out rows (`test.jsonl`) that judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.examples import ExampleSet
from d2c_mlx.models.model import Model
from d2c_mlx.models.rows import (
    Row,
    answered_row,
    is_prompt,
    prompt_key,
    read_rows,
    row_format,
    write_rows,
)
from d2c_mlx.utils.errors import InputError, TaskError, collect, gather, warn

__all__ = [
    "AT_ONCE",
    "Task",
    "TaskRows",
    "answer_prompts",
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

# Prompts that are answered at once.
AT_ONCE = 16
# Tokens after which an answer is cut; one that did not end by then is no row.
_MOST_TOKENS = 256
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
        encode: tokenizes rows, see `Model.encode`.
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
    """The rows with the answers that `answer_prompts` wrote in place of the prompts."""

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
    spare = spare_tasks(directory, names)

    def load(name: str) -> TaskRows:
        if spare and not (directory / name).is_dir():
            raise TaskError(
                f"{directory / name}: missing; found {', '.join(spare[:8])}, which no adapter is"
                " called. Rename the folder, or name the adapter after it: --adapters"
                f" NAME=PATH/{name}"
            )
        return load_task(directory / name, tests, prompts)

    return gather(partial(load, name) for name in names)


def spare_tasks(directory: Path, names: Iterable[str]) -> list[str]:
    """Sorted folders with rows that are no task of `names`, such as one with a misspelt name."""
    folders = {path.parent.name for path in directory.glob("*/*.jsonl")}
    return sorted(name for name in folders - set(names) if name[0] != ".")


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
        encode: tokenizes rows, see `Model.encode`.
        tasks: tasks whose `probe` is read.
        n: rows per task; None takes all.

    Raises:
        TaskError: the problems of all rows.
    """
    return gather(partial(encode, task.name, task.probe[:n], task.probe_places) for task in tasks)


def encode_tests(encode: Encode, tasks: Iterable[TaskRows], n: int | None) -> list[ExampleSet]:
    """Tokenize the first `n` held-out rows of every task, or all; else as `encode_probes`."""
    return gather(partial(encode, task.name, task.test[:n], task.test_places) for task in tasks)


def answer_prompts(
    base: Model, adapters: Sequence[Adapter], tasks: Sequence[TaskRows], directory: Path
) -> None:
    """Let adapters answer the prompts of their tasks, greedily, each into files of its rows.

    Args:
        base: their base model.
        adapters: one per task, in the same order.
        tasks: rows, of which those without an answer are asked.
        directory: the folder of the answers.

    Raises:
        TaskError: tasks none of whose answers ends.
    """
    failed, left_out, n_all = [], 0, 0
    for adapter, task in zip(adapters, tasks):
        for name, prompts in (("probe", task.prompts), ("test", task.test_prompts)):
            if not prompts:
                continue
            with base.attached(adapter):
                rows = _answered(base, task.name, prompts)
            left_out, n_all = left_out + len(prompts) - len(rows), n_all + len(prompts)
            if not rows and not (name == "probe" and task.probe):
                failed.append(f"{task.name}/{name}.jsonl")
            (directory / task.name).mkdir(exist_ok=True)
            write_rows(directory / task.name / f"{name}.jsonl", rows)
    if failed:
        raise TaskError(
            f"tasks: no answer to the prompts of {', '.join(failed)} ends within {_MOST_TOKENS}"
            " tokens; give more prompts, such as the adapter was trained on, or write the answers"
        )
    if left_out:
        warn(f"tasks: left out {left_out} of {n_all} prompts, whose answers do not end within"
             f" {_MOST_TOKENS} tokens")  # fmt: skip


def _answered(base: Model, task: str, prompts: Sequence[Row]) -> list[Row]:
    """Prompts with answers of the attached adapter that end and are not empty."""
    encoded = base.encode(task, [answered_row(row, "?") for row in prompts], ())
    rows = []
    for i in range(0, len(prompts), AT_ONCE):
        asked = [example.prompt_tokens for example in encoded.examples[i : i + AT_ONCE]]
        for row, tokens in zip(prompts[i:], base.answers(asked, [_MOST_TOKENS] * len(asked))):
            text = base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            if text and len(tokens) < _MOST_TOKENS:
                rows.append(answered_row(row, text))
    return rows
