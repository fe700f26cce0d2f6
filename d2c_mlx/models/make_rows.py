"""Rows of a task, made from one file, or from the adapter's own answers to prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.adapters.checks import BaseWeights
from d2c_mlx.adapters.reading import read_adapters
from d2c_mlx.adapters.sources import Source
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.examples import encode_prompts
from d2c_mlx.models.rows import Row, prompt_key, read_rows
from d2c_mlx.models.tasks import probe_file
from d2c_mlx.utils.errors import TaskError, gather
from d2c_mlx.utils.files import read_text, write_text

__all__ = [
    "AT_ONCE",
    "PROMPTS",
    "Answered",
    "Asking",
    "answer_tasks",
    "read_prompts",
    "split_rows",
    "whole_answers",
]

FILES = ("probe.jsonl", "test.jsonl")
PROMPTS = "prompts.txt"
# Prompts that are answered at once.
AT_ONCE = 16


@dataclass(frozen=True)
class Asking:
    """How adapters are asked.

    Attributes:
        system: system message before each prompt; None leaves it to the chat template.
        max_tokens: most tokens of an answer; one that does not end by then is left out.
        n_probe: most calibration rows, and no more than half of the rows.
        dora_rank: see `BaseWeights`.
    """

    system: str | None = None
    max_tokens: int = 256
    n_probe: int = 10
    dora_rank: int | None = None


@dataclass(frozen=True)
class Answered:
    """The rows that one adapter's answers became.

    Attributes:
        task: name of adapter and task.
        probe: number of calibration rows.
        test: number of held-out rows.
        left_out: number of prompts whose answer was empty, or did not end.
        prompt: one of the prompts.
        answer: its answer.
    """

    task: str
    probe: int
    test: int
    left_out: int
    prompt: str
    answer: str


def split_rows(path: Path, output: Path, n_probe: int, n_test: int, seed: int = 0) -> list[int]:
    """Write `probe.jsonl` and `test.jsonl` from one file; rows with one prompt stay together.

    Args:
        path: a JSONL file in one of mlx-lm's formats, such as its `train.jsonl`.
        output: the task's directory, made if need be.
        n_probe: calibration rows.
        n_test: most held-out rows.
        seed: of the shuffle.

    Returns:
        The number of rows of each file.

    Raises:
        TaskError: problems of the rows, too few prompts, or a file that is there and not empty.
    """
    _check_empty(output)
    rows: dict[str, Row] = {}
    for row in read_rows(path, "give a JSONL file of rows").values():
        # One row for each prompt: more would count it twice.
        rows.setdefault(prompt_key(row), row)
    if len(rows) <= n_probe:
        raise TaskError(
            f"{path}: found {len(rows)} different prompts, expected more than the {n_probe}"
            " calibration rows, as others must judge; give more rows, or a smaller --probe"
        )
    return _deal(rows, output, n_probe, n_test, seed)


def read_prompts(sources: Sequence[Source], tasks: Path) -> list[tuple[Source, list[str]]]:
    """Read the lines of `prompts.txt` of tasks that lack rows.

    Args:
        sources: the adapters.
        tasks: the folder of rows, with `prompts.txt` in the tasks' directories.

    Returns:
        Adapters that have prompts and no rows, each with its different prompts.

    Raises:
        TaskError: there are none, or the problems of all of them.
    """
    asked = [one for one in sources if (tasks / one.name / PROMPTS).is_file()]
    asked = [one for one in asked if not _has_rows(tasks / one.name)]
    if not asked:
        raise TaskError(
            f"{tasks}: no adapter without rows has prompts; write 20 or more, one a line, to"
            f" {tasks / 'NAME' / PROMPTS}"
        )
    return list(zip(asked, gather(partial(_prompts_of, tasks / one.name) for one in asked)))


def answer_tasks(
    base: BaseModel, prompts: Sequence[tuple[Source, Sequence[str]]], tasks: Path, asking: Asking
) -> Iterator[Answered]:
    """Let adapters answer prompts, greedily, and write that as the rows of their tasks.

    Args:
        base: the base model; the last adapter stays attached to it.
        prompts: of `read_prompts`.
        tasks: the folder of rows.
        asking: how they are asked.

    Yields:
        What became of each task, as soon as it is written.

    Raises:
        InputError: an adapter cannot be read, or has hardly any answers.
    """
    sources = [source for source, _ in prompts]
    own = BaseWeights(base.weight, asking.dora_rank)
    adapters = read_adapters(sources, base.module_shapes, base.config, base=own)
    for adapter, (source, some) in zip(adapters, prompts):
        yield _answer_task(base, adapter, tasks / source.name, some, asking)


def whole_answers(base: BaseModel, prompts: Sequence[Sequence[int]], most: int) -> list[str]:
    """Greedy answers of the attached adapter; empty where one does not end within `most` tokens.

    Args:
        base: the base model.
        prompts: token ids of each.
        most: tokens of an answer that is cut.
    """
    parts = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
    said = [one for part in parts for one in base.answers(part, [most] * len(part))]
    return [
        base.tokenizer.decode(one, skip_special_tokens=True).strip() if len(one) < most else ""
        for one in said
    ]


def _has_rows(task: Path) -> bool:
    paths = probe_file(task), task / "test.jsonl"
    return all(path.is_file() and path.stat().st_size for path in paths)


def _prompts_of(task: Path) -> list[str]:
    _check_empty(task)
    path = task / PROMPTS
    try:
        lines = read_text(path).split("\n")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    found = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    if len(found) < 2:
        raise TaskError(f"{path}: found {len(found)} prompts, expected 20 or more, one a line")
    return found


def _answer_task(
    base: BaseModel, adapter: Adapter, task: Path, prompts: Sequence[str], asking: Asking
) -> Answered:
    tokens = encode_prompts(base.tokenizer, prompts, asking.system)
    base.attach(adapter)
    answers = whole_answers(base, tokens, asking.max_tokens)
    rows = {prompt: _row(prompt, said, asking.system)
            for prompt, said in zip(prompts, answers) if said}  # fmt: skip
    if len(rows) < 2:
        raise TaskError(
            f"{task / PROMPTS}: found {len(rows)} answers of {adapter.name} that are not empty and"
            f" end within {asking.max_tokens} tokens, expected at least 2; see --max-tokens, or"
            " write the rows"
        )
    n_probe = min(asking.n_probe, len(rows) // 2)
    probe, test = _deal(rows, task, n_probe, len(rows))
    prompt, row = next(iter(rows.items()))
    said = row.get("completion") or row["messages"][-1]["content"]
    return Answered(adapter.name, probe, test, len(prompts) - len(rows), prompt, said)


def _row(prompt: str, said: str, system: str | None) -> Row:
    if system is None:
        return {"prompt": prompt, "completion": said}
    parts = (("system", system), ("user", prompt), ("assistant", said))
    return {"messages": [{"role": role, "content": content} for role, content in parts]}


def _check_empty(task: Path) -> None:
    paths = [task / name for name in FILES]
    if there := [str(path) for path in paths if path.exists() and path.stat().st_size]:
        raise TaskError(f"{', '.join(there)}: there already; move it, or give another --output")


def _deal(
    rows: Mapping[str, Row], output: Path, n_probe: int, n_test: int, seed: int = 0
) -> list[int]:
    """Write shuffled rows, by prompt, to the two files; their numbers."""
    keys = sorted(rows)
    random.Random(seed).shuffle(keys)
    parts = keys[:n_probe], keys[n_probe : n_probe + n_test]
    output.mkdir(parents=True, exist_ok=True)
    for name, some in zip(FILES, parts):
        lines = (json.dumps(rows[key], ensure_ascii=False) for key in some)
        write_text(output / name, "".join(f"{line}\n" for line in lines))
    return [len(some) for some in parts]
