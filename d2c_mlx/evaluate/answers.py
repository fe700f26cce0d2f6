"""Greedy answers: to held-out rows, to judge, and to prompts that have none, to be rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.evaluate.heldout import BenchMethod
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import Example, ExampleSet
from d2c_mlx.models.make_rows import whole_answers
from d2c_mlx.models.rows import Row, prompt_key, row_format
from d2c_mlx.models.tasks import TaskRows, load_tasks
from d2c_mlx.utils.errors import TaskError, warn
from d2c_mlx.utils.files import fingerprint, read_text, write_dir, write_json, write_text
from d2c_mlx.utils.parsing import parse_json
from d2c_mlx.utils.progress import Progress

__all__ = ["OwnAnswers", "answer_rows", "check_prompts", "max_answer_tokens", "prompt_and_expected"]

# Tokens after which an answer is cut; one that did not end by then is no row.
_MOST_TOKENS = 256
# Which prompts the answers are to, and whose they are.
_OF = "prompts.json"


class Answerer(Protocol):
    """A model that answers: `BaseModel` or `StockModel`."""

    tokenizer: Any

    def attach(self, adapter: Adapter | None, /) -> None:
        """Put an adapter in place of the last one."""

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Greedy tokens after each prompt."""


def answer_rows(
    model: Answerer,
    methods: Mapping[str, BenchMethod],
    tasks: Iterable[tuple[Sequence[Row], ExampleSet]],
    progress: Progress | None = None,
) -> dict[str, list[dict[str, str]]]:
    """Greedy answers to some rows of tasks under every method's first variant.

    An answer is cut after `max_answer_tokens`. All rows under one adapter are answered at once.

    Args:
        model: the last adapter stays attached to it.
        methods: name -> what serves the tasks.
        tasks: of each task rows as read, and the same rows tokenized, and maybe more. Of rows in
            mlx-lm's `text` format, which have no prompt, there are no answers.
        progress: shows progress; None shows nothing.

    Returns:
        Task -> for each row `prompt` (the user's last message), `expected`, and each method's
        answer.
    """
    progress = progress or Progress()
    found: dict[str, list[dict[str, str]]] = {}
    asked: dict[str, Sequence[Example]] = {}
    for rows, examples in tasks:
        some = rows if rows and row_format(rows[0]) != ("text",) else ()
        found[examples.task] = [prompt_and_expected(row) for row in some]
        asked[examples.task] = examples.examples[: len(some)]
    adapters: dict[str, Adapter | None] = {}
    # Adapter -> task -> the methods that it serves it in.
    uses: dict[str, dict[str, list[str]]] = {}
    for name, method in methods.items():
        for task in found:
            adapter = method.variants[0][task]
            key = adapter.digest if adapter else "base"
            adapters[key] = adapter
            uses.setdefault(key, {}).setdefault(task, []).append(name)
    for key, of in uses.items():
        batch = [(row, example, names) for task, names in of.items()
                 for row, example in zip(found[task], asked[task])]  # fmt: skip
        most = [max_answer_tokens(example) for _, example, _ in batch]
        progress.expect(sum(most))
        model.attach(adapters[key])
        answers = model.answers([example.prompt_tokens for _, example, _ in batch], most)
        for (row, _, names), tokens in zip(batch, answers):
            said = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            row.update(dict.fromkeys(names, said))
        progress.advance(sum(most))
    return found


def max_answer_tokens(example: Example) -> int:
    """Tokens after which an answer is cut, since by then it is wrong."""
    return 2 * example.n_targets + 16


def prompt_and_expected(row: Row) -> dict[str, str]:
    """A row's last user message as `prompt`, and its answer as `expected`."""
    if row_format(row) == ("messages",):
        asked = [one["content"] for one in row["messages"][:-1]]
        return {"prompt": asked[-1] if asked else "", "expected": row["messages"][-1]["content"]}
    return {"prompt": row["prompt"], "expected": row["completion"]}


def check_prompts(prompts: Mapping[str, Sequence[Row]], names: Iterable[str]) -> None:
    """Check that there are prompts enough to be all the rows of these tasks.

    Raises:
        TaskError: tasks with fewer than two prompts.
    """
    few = [name for name in names if len(_each_once(prompts.get(name, ()))) < 2]
    if few:
        raise TaskError(
            f"unlabelled: found fewer than 2 prompts for {', '.join(few)}, expected 2 or more for"
            " each adapter: one to decide by, one to judge by; 20 are better"
        )


def _each_once(rows: Sequence[Row]) -> list[Row]:
    return list({prompt_key(row): row for row in rows}.values())


@dataclass(frozen=True)
class OwnAnswers:
    """Prompts of tasks, and the folder of the answers: `<task>/probe.jsonl` and `test.jsonl`.

    Answers that are there are never replaced: a person may have corrected or removed some. They are
    the rows of a run that has no others; else more of them, and none is held out.

    Attributes:
        directory: the folder; what is in it is read as it is.
        prompts: task -> rows in mlx-lm's chat format with a stand-in for the answer, see
            `load_unlabelled`.
        n_probe: most calibration rows of a task, and no more than half; the others are held out.
            None where there are other rows.
        by: whose answers they are, adapters and base model, as a JSON value; None where that is not
            known, and not compared.
        like: a folder of the same answers, if it is there; what is in it is copied.
    """

    directory: Path
    prompts: Mapping[str, Sequence[Row]]
    n_probe: int | None
    by: object = None
    like: Path | None = None

    def in_place(self, directory: Path) -> OwnAnswers:
        """The same answers in another folder, copied where they are in this one."""
        return replace(self, directory=directory, like=self.directory)

    @property
    def there(self) -> bool:
        """True if the prompts are answered."""
        return self.directory.exists()

    def tasks(self, names: Sequence[str]) -> list[TaskRows]:
        """The rows of a run without others; the prompts and stand-ins where they are not answered.

        Raises:
            TaskError: see `check_prompts`; other answers than this run's, or what a
                person wrote that is no row.
        """
        check_prompts(self.prompts, names)
        if not self.there:
            return [self._split(name, self._distinct[name]) for name in names]
        self._check()
        return load_tasks(self.directory, names)

    def rows(self) -> dict[str, Sequence[Row]]:
        """The answered rows by task, for a run that has others; none if they are not answered.

        Raises:
            TaskError: other answers than this run's, or what a person wrote that is no row.
        """
        if not self.there:
            return {}
        self._check()
        return {one.name: one.probe for one in load_tasks(self.directory, self.prompts, False)}

    def _check(self) -> None:
        of = self._of
        try:
            found = parse_json(read_text(self.directory / _OF))
        except (OSError, ValueError) as error:
            raise TaskError(
                f"{self.directory / _OF}: not readable ({error}); delete {self.directory} to have"
                " the prompts answered again"
            ) from None
        # Earlier versions wrote the prompts' hash alone.
        old = found if isinstance(found, dict) else {"prompts": found}
        split = any(self.directory.glob("*/test.jsonl"))
        if old.get("prompts") != of["prompts"]:
            what = "to other prompts than those of --unlabelled"
        elif self.by is not None and old.get("by", of["by"]) != of["by"]:
            what = "of other adapters, or of another base model, than this run has"
        elif split != bool(self.n_probe):
            kinds = ("without", "beside") if split else ("beside", "without")
            what = "made {} --tasks, expected {}".format(*kinds)
        else:
            self._say_split(old.get("n_probe", self.n_probe))
            return
        # Beside other rows none are held out.
        use = f"use them with --tasks {self.directory} and" if split else "give"
        raise TaskError(f"{self.directory}: answers {what}; {use} another --output, or delete them")

    def _say_split(self, n: int | None) -> None:
        if n != self.n_probe:
            warn(
                f"probe_examples: found {self.n_probe}, but {self.directory} has {n} calibration"
                " rows a task, as it was answered for; delete it for another split"
            )

    def write(
        self, base: BaseModel, adapters: Sequence[Adapter], done: Callable[[Path], None]
    ) -> None:
        """Let each adapter answer its prompts, unless that is done.

        Args:
            base: their base model; the last adapter stays attached.
            adapters: one per task, of its name.
            done: takes the complete folder before it takes its place.

        Raises:
            TaskError: tasks with too few answers; nothing is written.
        """
        if self.there:
            return
        if self.like and self.like.exists():
            with write_dir(self.directory) as directory:
                hidden = shutil.ignore_patterns(".*")
                shutil.copytree(self.like, directory, ignore=hidden, dirs_exist_ok=True)
                done(directory)
            return
        asked = [one for one in adapters if one.name in self.prompts]
        found = {one.name: self._answered(base, one) for one in asked}
        least = 2 if self.n_probe else 1
        few = [name for name, rows in found.items() if len(rows) < least]
        if few:
            raise TaskError(
                f"unlabelled: fewer than {least} prompts of {', '.join(few)} have an answer that"
                f" ends within {_MOST_TOKENS} tokens; give more prompts, such as the adapter was"
                " trained on"
            )
        left_out = {name: len(self._distinct[name]) - len(rows) for name, rows in found.items()}
        if n := sum(left_out.values()):
            n_all = sum(map(len, self._distinct.values()))
            warn(
                f"unlabelled: left out {n} of {n_all} prompts, whose answers do not end within"
                f" {_MOST_TOKENS} tokens (most of {max(left_out, key=left_out.__getitem__)})"
            )
        with write_dir(self.directory) as directory:
            for name, rows in found.items():
                task = self._split(name, rows)
                (directory / name).mkdir()
                for file, some in (("probe", task.probe), ("test", task.test)):
                    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in some]
                    if lines:
                        write_text(directory / name / f"{file}.jsonl", "".join(lines))
            write_json(directory / _OF, self._of)
            done(directory)

    @cached_property
    def _distinct(self) -> dict[str, list[Row]]:
        """The prompts of every task, each once."""
        return {name: _each_once(rows) for name, rows in self.prompts.items()}

    @property
    def _of(self) -> dict[str, Any]:
        prompts, by = fingerprint(self._distinct), fingerprint(self.by)
        return {"prompts": prompts, "by": by, "n_probe": self.n_probe}

    def _split(self, name: str, rows: Sequence[Row]) -> TaskRows:
        n = min(self.n_probe, (len(rows) + 1) // 2) if self.n_probe else len(rows)
        return TaskRows(name, tuple(rows[:n]), tuple(rows[n:]))

    def _answered(self, base: BaseModel, adapter: Adapter) -> list[Row]:
        """The prompts of a task with answers that end and are not empty."""
        rows = self._distinct[adapter.name]
        examples = base.encode(adapter.name, rows, ()).examples
        base.attach(adapter)
        texts = whole_answers(base, [one.prompt_tokens for one in examples], _MOST_TOKENS)
        plain = all(len(row["messages"]) == 2 for row in rows)
        return [
            {key: row[key] for key in ("tools",) if key in row} | (
                {"prompt": row["messages"][0]["content"], "completion": text} if plain
                else {"messages": [*row["messages"][:-1], {"role": "assistant", "content": text}]}
            )
            for row, text in zip(rows, texts) if text
        ]  # fmt: skip
