"""Tasks: calibration rows (`probe.jsonl`) that decide, held-out rows (`test.jsonl`) that judge."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
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

# Tokens after which an answer is cut; one that did not end by then is no row.
_MOST_TOKENS = 256
# `encode` of one model: name of the set and its rows.
Encode = Callable[[str, Sequence[Row]], ExampleSet]


@dataclass(frozen=True)
class TaskRows:
    """Rows of `probe.jsonl` and `test.jsonl`, as mlx-lm's dataset classes take them.

    Attributes:
        name: the name of its directory, and of the adapter.
        probe: calibration rows, by which everything is decided; all are prompts where no row of
            `probe.jsonl` has an answer.
        test: held-out rows, which only judge; all are prompts, or none.
        extra: prompts beside `probe`, or the adapter's answers to them.
    """

    name: str
    probe: tuple[Row, ...]
    test: tuple[Row, ...]
    extra: tuple[Row, ...] = ()

    @property
    def asked(self) -> dict[str, list[Row]]:
        """File name -> its rows without an answer, which the adapter has to give."""
        files = {"probe.jsonl": (*self.probe, *self.extra), "test.jsonl": self.test}
        asked = {name: list(filter(is_prompt, rows)) for name, rows in files.items()}
        return {name: prompts for name, prompts in asked.items() if prompts}

    def used(self, n_probe: int, n_test: int | None, extra: bool) -> "TaskRows":
        """The rows that a run uses: the first of each kind; None is all.

        `extra` is True if something reads answers to prompts beside calibration rows.
        """
        probe, test = self.probe[:n_probe], self.test[:n_test]
        return TaskRows(self.name, probe, test, self.extra if extra else ())

    def answered(self, directory: Path) -> "TaskRows":
        """The rows with the answers that `answer_prompts` wrote in place of the prompts."""

        def read(path: Path) -> tuple[Row, ...]:
            # Of prompts beside other rows no answer may have ended.
            return tuple(read_rows(path, "run again")) if path.stat().st_size else ()

        answers = {name: read(directory / name) for name in self.asked}
        probe = answers.get("probe.jsonl", ())
        test = answers.get("test.jsonl", self.test)
        if is_prompt(self.probe[0]):
            return TaskRows(self.name, probe, test)
        return TaskRows(self.name, self.probe, test, probe)


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

    Raises:
        TaskError: the problems of all rows.
    """
    kinds = [[answered_row(row, "?") if is_prompt(row) else row for row in kind]
             for kind in (rows.probe, rows.test, rows.extra)]  # fmt: skip
    calibration, held_out, extra = gather(partial(encode, rows.name, kind) for kind in kinds)
    more = extra if rows.extra else None
    return Task(rows.name, calibration.halved(), held_out.halved(), rows, more)


def load_tasks(
    directory: Path, names: Iterable[str], tests: bool = True, prompts: bool = False
) -> list[TaskRows]:
    """Load the task of every adapter.

    `directory` holds a directory per task of `names`, those of their adapters. See `load_task`.

    Raises:
        InputError: the problems of all tasks, one line each.
    """
    if not directory.is_dir():
        raise TaskError(
            f"{directory}: {'a file' if directory.exists() else 'no such directory'}; --tasks holds"
            " <adapter>/probe.jsonl, and d2c-mlx init DIR writes what is missing"
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
    hint = "every adapter needs its task's probe.jsonl"
    hint += ", test.jsonl; run --skip-bad leaves out those without" if tests else ""
    if not probes.is_file() and (inner := spare_tasks(directory, ())):
        hint = f"found folders of tasks, expected one of these; give {directory / inner[0]}"
    probe = collect(errors, partial(read_rows, probes, hint, prompts)) or []
    test = collect(errors, partial(read_rows, tested, hint, prompts)) or [] if tests else []
    problems = [line for error in errors for line in error.problems]
    keys = {prompt_key(row) for row in probe}
    if shared := [row for row in test if prompt_key(row) in keys]:
        problems.append(
            f"{shared[0].place}: this prompt is in {probes.name} too ({len(shared)} such rows);"
            " probe and test must be disjoint: remove them from one"
        )
    asked = [row for row in test if is_prompt(row)]
    if asked and len(asked) < len(test):
        problems.append(
            f"{asked[0].place}: has no answer, as {len(asked)} of {len(test)} rows; expected an"
            " answer in all of them or in none, which the adapter then gives"
        )
    if problems:
        raise TaskError(problems)
    answered = [row for row in probe if not is_prompt(row)]
    own = {prompt_key(row) for row in answered}
    others = {prompt_key(row): row for row in probe if prompt_key(row) not in own}.values()
    extra = others if answered else ()
    return TaskRows(directory.name, tuple(answered or others), tuple(test), tuple(extra))


def common_system(tasks: Iterable[TaskRows]) -> str | None:
    """The system message that all calibration rows of all tasks begin with; None if they differ."""
    first = [row["messages"][0] if row_format(row) == ("messages",) else {}
             for task in tasks for row in task.probe]  # fmt: skip
    systems = {message.get("content") if message.get("role") == "system" else None
               for message in first}  # fmt: skip
    return systems.pop() if len(systems) == 1 else None


def systems_of(tasks: Iterable[TaskRows]) -> dict[str, str]:
    """Task -> its `common_system`, without tasks that have none."""
    systems = {task.name: common_system([task]) for task in tasks}
    return {name: system for name, system in systems.items() if system is not None}


def encode_rows(
    encode: Encode, tasks: Iterable[TaskRows], n: int | None, held_out: bool = False
) -> list[ExampleSet]:
    """Tokenize the first `n` calibration rows of every task, or held-out rows; None is all.

    Raises:
        TaskError: the problems of all rows.
    """
    kinds = [(task.name, task.test if held_out else task.probe) for task in tasks]
    return gather(partial(encode, name, rows[:n]) for name, rows in kinds)


def answer_prompts(
    base: Model, adapters: Sequence[Adapter], tasks: Sequence[TaskRows], directory: Path
) -> None:
    """Let adapters answer the prompts of their tasks, greedily, each into files of its rows.

    Answers that are empty, or do not end, are left out. `adapters` are those of `tasks`, in their
    order; `directory` is the folder of the answers.

    Raises:
        TaskError: tasks none of whose answers ends.
    """
    failed, left_out, n_all = [], 0, 0
    for adapter, task in zip(adapters, tasks):
        (directory / task.name).mkdir(exist_ok=True)
        for name, prompts in task.asked.items():
            encoded = base.encode(task.name, [answered_row(row, "?") for row in prompts])
            asked, rows = [example.prompt_tokens for example in encoded.examples], list[Row]()
            n = len(asked)
            answers = base.answers(asked, [_MOST_TOKENS] * n, [adapter] * n)
            for row, tokens in zip(prompts, answers):
                text = base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
                if text and len(tokens) < _MOST_TOKENS:
                    rows.append(answered_row(row, text))
            left_out, n_all = left_out + len(prompts) - len(rows), n_all + len(prompts)
            if not rows and (name == "test.jsonl" or not task.extra):
                failed.append(f"{task.name}/{name}")
            write_rows(directory / task.name / name, rows)
    if failed:
        raise TaskError(
            f"tasks: no answer to the prompts of {', '.join(failed)} ends within {_MOST_TOKENS}"
            " tokens; give more prompts, such as the adapter was trained on, or write the answers"
        )
    if left_out:
        warn(f"tasks: left out {left_out} of {n_all} prompts, whose answers do not end within"
             f" {_MOST_TOKENS} tokens")  # fmt: skip
