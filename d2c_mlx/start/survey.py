"""A look at a folder of adapters and their rows, before a base model is there."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx

from d2c_mlx.adapters.adapter import WEIGHTS, Adapter
from d2c_mlx.adapters.mlx_format import load_adapter
from d2c_mlx.adapters.peft_format import PEFT_WEIGHTS, load_peft
from d2c_mlx.adapters.sources import Source, find_adapters
from d2c_mlx.models.tasks import probe_file, read_rows
from d2c_mlx.utils.errors import InputError, collect

__all__ = ["Found", "Survey", "survey"]

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Found:
    """One adapter of a survey.

    Attributes:
        name: of the adapter and of its task.
        base: the base model that its config names.
        rank: its largest rank; None where only the base model can tell (GGUF) or it is unreadable.
        modules: last parts of the module paths, such as `q_proj`.
        nbytes: bytes in mlx-lm's layout in 16 bit; of a GGUF the bytes of the file.
        rows: calibration and held-out rows, 0 where there are none.
        problems: why it, or its rows, cannot be used.
    """

    name: str
    base: str | None = None
    rank: int | None = None
    modules: tuple[str, ...] = ()
    nbytes: int = 0
    rows: tuple[int, int] = (0, 0)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What `survey` found.

    Attributes:
        adapters: the folder, as it was given.
        tasks: the folder of their rows, which may not exist.
        found: the adapters, sorted by name.
    """

    adapters: str
    tasks: Path
    found: list[Found] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters in 16 bit."""
        return sum(one.nbytes for one in self.found)

    @property
    def base(self) -> str | None:
        """The base model that most adapters name."""
        named = Counter(one.base for one in self.found if one.base)
        return named.most_common(1)[0][0] if named else None

    @property
    def without_rows(self) -> list[str]:
        """Names of adapters that lack calibration or held-out rows."""
        return [one.name for one in self.found if 0 in one.rows]

    @property
    def problems(self) -> list[str]:
        """The problems of all adapters."""
        return [line for one in self.found for line in one.problems]


def survey(adapters: str, tasks: Path | None = None) -> Survey:
    """Look at every adapter of a folder and at its rows; nothing is written.

    Args:
        adapters: the folder, or a list, as for `--adapters`.
        tasks: the folder of rows; None is `tasks` beside the adapters.

    Raises:
        InputError: there are no adapters. What is wrong with one of them is in `Survey.problems`.
    """
    sources = find_adapters(adapters)
    tasks = tasks or Path(adapters).parent / "tasks"
    return Survey(adapters, tasks, [_look(source, tasks / source.name) for source in sources])


def _look(source: Source, task: Path) -> Found:
    errors: list[InputError] = []
    adapter = collect(errors, lambda: _load(source.path))
    rows = []
    for path in (probe_file(task), task / "test.jsonl"):
        there = path.is_file() and path.stat().st_size > 0
        found = collect(errors, partial(read_rows, path, "")) if there else None
        rows.append(len(found or ()))
    problems = tuple(line for error in errors for line in error.problems)
    about = Found(source.name, rows=(rows[0], rows[1]), problems=problems)
    if adapter is None:
        size = source.path.stat().st_size if source.path.is_file() else 0
        return Found(about.name, nbytes=size, rows=about.rows, problems=problems)
    blocks = [int(part) for path in adapter.modules for part in _BLOCK.findall(path)[:1]]
    return Found(
        source.name, adapter.base, adapter.rank,
        tuple(sorted({path.rpartition(".")[2] for path in adapter.modules})),
        adapter.uniform(mx.float16).nbytes(max(blocks, default=0) + 1), about.rows, problems,
    )  # fmt: skip


def _load(path: Path) -> Adapter | None:
    """Read an adapter without its base; None for a GGUF, which needs the base's module names."""
    if (path / PEFT_WEIGHTS).exists():
        return load_peft(path)
    gguf = path.is_file() or (not (path / WEIGHTS).exists() and any(path.glob("*.gguf")))
    return None if gguf else load_adapter(path)
