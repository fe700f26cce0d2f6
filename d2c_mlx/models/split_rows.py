"""Splitting a file of rows into calibration rows and held-out rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

from d2c_mlx.models.tasks import prompt_key, read_rows
from d2c_mlx.utils.errors import TaskError
from d2c_mlx.utils.files import write_text

__all__ = ["split_rows"]

FILES = ("probe.jsonl", "test.jsonl")


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
    paths = [output / name for name in FILES]
    if there := [str(path) for path in paths if path.exists() and path.stat().st_size]:
        raise TaskError(f"{', '.join(there)}: there already; move it, or give another --output")
    groups: dict[str, list[str]] = {}
    for row in read_rows(path, "give a JSONL file of rows").values():
        line = json.dumps(row, ensure_ascii=False)
        groups.setdefault(prompt_key(row), []).append(line)
    if len(groups) <= n_probe:
        raise TaskError(
            f"{path}: found {len(groups)} different prompts, expected more than the {n_probe}"
            " calibration rows, as others must judge; give more rows, or a smaller --probe"
        )
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    # One row for each calibration prompt: more would count it twice.
    probe = [groups[key][0] for key in keys[:n_probe]]
    test = [groups[key][0] for key in keys[n_probe : n_probe + n_test]]
    output.mkdir(parents=True, exist_ok=True)
    for file, lines in zip(paths, (probe, test)):
        write_text(file, "".join(f"{line}\n" for line in lines))
    return [len(probe), len(test)]
