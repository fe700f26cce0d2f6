"""Rows of a task, made from one file, or from the adapter's own answers to prompts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from d2c_mlx.adapters.adapter import Adapter
from d2c_mlx.models.base_model import BaseModel
from d2c_mlx.models.rows import Row, answered_row, prompt_key, read_rows
from d2c_mlx.models.tasks import TaskRows
from d2c_mlx.utils.errors import TaskError, warn
from d2c_mlx.utils.files import write_text

__all__ = ["AT_ONCE", "answer_prompts", "split_rows"]

# Prompts that are answered at once.
AT_ONCE = 16
# Tokens after which an answer is cut; one that did not end by then is no row.
_MOST_TOKENS = 256


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
    paths = [output / "probe.jsonl", output / "test.jsonl"]
    if there := [str(path) for path in paths if path.exists() and path.stat().st_size]:
        raise TaskError(f"{', '.join(there)}: there already; move it, or give another --output")
    rows: dict[str, Row] = {}
    for row in read_rows(path, "give a JSONL file of rows", prompts=True).values():
        # One row for each prompt: more would count it twice.
        rows.setdefault(prompt_key(row), row)
    if len(rows) <= n_probe:
        raise TaskError(
            f"{path}: found {len(rows)} different prompts, expected more than the {n_probe}"
            " calibration rows, as others must judge; give more rows, or a smaller --probe"
        )
    keys = sorted(rows)
    random.Random(seed).shuffle(keys)
    parts = keys[:n_probe], keys[n_probe : n_probe + n_test]
    output.mkdir(parents=True, exist_ok=True)
    for file, part in zip(paths, parts):
        _write(file, (rows[key] for key in part))
    return [len(part) for part in parts]


def answer_prompts(
    base: BaseModel, adapters: Sequence[Adapter], tasks: Sequence[TaskRows], directory: Path
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
            _write(directory / task.name / f"{name}.jsonl", rows)
    if failed:
        raise TaskError(
            f"tasks: no answer to the prompts of {', '.join(failed)} ends within {_MOST_TOKENS}"
            " tokens; give more prompts, such as the adapter was trained on, or write the answers"
        )
    if left_out:
        warn(f"tasks: left out {left_out} of {n_all} prompts, whose answers do not end within"
             f" {_MOST_TOKENS} tokens")  # fmt: skip


def _answered(base: BaseModel, task: str, prompts: Sequence[Row]) -> list[Row]:
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


def _write(path: Path, rows: Iterable[Row]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
