"""A look at a folder of adapters and their rows, and the files that a first run needs.

No base model is loaded, and nothing of the user's is replaced.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import yaml

from d2c_mlx.adapters.reading import read_adapter, weights_file
from d2c_mlx.adapters.sources import Source, find_adapters
from d2c_mlx.models.resolve import EMBEDDED
from d2c_mlx.models.rows import read_rows
from d2c_mlx.models.tasks import probe_file
from d2c_mlx.utils.errors import AdapterError, InputError, collect
from d2c_mlx.utils.files import write_text
from d2c_mlx.utils.templates import size, span

__all__ = ["NOTE", "Found", "Survey", "budgets", "describe", "scaffold", "survey"]

NOTE = "README.md"
_SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03)
_ROWS = """\
# Rows
A folder per adapter, called like it, with two files, one JSON object a line:

- `probe.jsonl`: about 10 calibration rows, which decide what is merged and how much is kept.
- `test.jsonl`: 30 to 100 held-out rows, which judge; 10 judge roughly. No prompt may be in both.

Take rows like those that the adapter was trained on, but not those. One of these ways for each:

1. A file of rows: `d2c-mlx tasks split FILE --output tasks/NAME` makes both. Without
   `probe.jsonl`, mlx-lm's `valid.jsonl` is read.
2. Write them, in one of mlx-lm's formats (one per file):

       {"prompt": "What is asked", "completion": "the right answer"}
       {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
       {"text": "only where the adapter was trained on plain text"}

   Many chat templates add a system message of their own. If the adapter was trained with another,
   or an empty one, begin `messages` with it: {"role": "system", "content": ""}.
3. Only prompts: rows without "completion", such as {"prompt": "What is asked"}. The adapter
   answers them at the beginning of a run, and its answers are the rows.
"""
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
        tasks: the folder of rows; None is the folder beside it that has most of them, or `tasks`
            beside it; for an adapter, or a list, the same here.

    Raises:
        InputError: there are no adapters, or none that can be read. What is wrong with some of
            them is in `Survey.problems`.
    """
    sources = find_adapters(adapters)
    if tasks is None:
        folder = Path(adapters)
        # "." would put them among the adapters.
        folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))
        listed = all(source.folder for source in sources)
        tasks = _rows_beside(folder.parent if listed else Path(), sources)
    found = Survey(adapters, tasks, [_look(source, tasks / source.name) for source in sources])
    if all(one.problems and not one.modules for one in found.found):
        raise AdapterError(found.problems)
    return found


def _rows_beside(root: Path, sources: Sequence[Source]) -> Path:
    """The folder in `root` with rows of most adapters, such as mlx-lm's data; else `tasks`."""

    def count(folder: Path) -> int:
        return sum(any((folder / one.name).glob("*.jsonl")) for one in sources)

    there = sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink())
    # The first of equals, so `tasks` before others.
    return max([root / "tasks", *there], key=count)


def _look(source: Source, task: Path) -> Found:
    errors: list[InputError] = []
    file = collect(errors, lambda: weights_file(source.path))
    # A GGUF cannot be read without the base's module names.
    readable = file is not None and file.suffix.lower() != ".gguf"
    adapter = collect(errors, lambda: read_adapter(source.path)) if readable else None
    rows = []
    for path in (probe_file(task), task / "test.jsonl"):
        there = path.is_file() and path.stat().st_size > 0
        found = collect(errors, partial(read_rows, path, "")) if there else None
        rows.append(len(found or ()))
    problems = tuple(line for error in errors for line in error.problems)
    about = Found(source.name, rows=(rows[0], rows[1]), problems=problems)
    if adapter is None:
        return replace(about, nbytes=file.stat().st_size if file else 0)
    blocks = [int(part) for path in adapter.modules for part in _BLOCK.findall(path)[:1]]
    return Found(
        source.name, adapter.base, adapter.rank,
        tuple(sorted({path.rpartition(".")[2] for path in adapter.modules})),
        adapter.uniform(mx.float16).nbytes(max(blocks, default=0) + 1), about.rows, problems,
    )  # fmt: skip


def budgets(found: Survey) -> list[tuple[str, int]]:
    """Budgets, as `--budget` takes them, and the bytes that each would be."""
    n, largest = len(found.found), max(one.nbytes for one in found.found)
    shares = [(f"{100 * share:g}%", int(share * found.nbytes)) for share in _SHARES]
    counts = sorted({k for k in (1, n // 8, n // 4, n // 2) if 0 < k < n}, reverse=True)
    return shares + [(str(k), k * largest) for k in counts]


def describe(found: Survey) -> str:
    """What a survey found, for people: adapters, bases, budgets, and what is missing."""
    ranks = sorted({one.rank for one in found.found if one.rank})
    modules = sorted({name for one in found.found for name in one.modules})
    bases = sorted({one.base or "not named" for one in found.found if one.modules})
    lines = [
        f"{len(found.found)} adapters in {found.adapters}, {size(found.nbytes)} in 16 bit",
        f"base model   {', '.join(bases) or 'unknown'}",
        f"ranks        {', '.join(map(str, ranks)) or 'unknown without the base model'}",
        f"modules      {', '.join(modules) or 'unknown without the base model'}",
        "",
        "budget       bytes",
        *(f"{text:<12} {size(nbytes)}" for text, nbytes in budgets(found)),
    ]
    if len({one.base for one in found.found if one.base}) > 1:
        lines += ["", "More than one base model: leave out what was trained on another one."]
    lines += ["", *(f"problem      {line}" for line in found.problems)] if found.problems else []
    lacking = found.without_rows
    if len(lacking) < len(found.found):
        probe, test = zip(*(one.rows for one in found.found if 0 not in one.rows))
        lines += ["", f"rows         in {found.tasks}: {span(probe)} calibration and {span(test)}"
                  " held-out rows each"]  # fmt: skip
    if lacking:
        lines += ["", f"rows         missing for {_few(lacking)} ({len(lacking)} of"
                  f" {len(found.found)}) in {found.tasks}"]  # fmt: skip
    return "\n".join(lines)


def scaffold(found: Survey, config: Path) -> list[Path]:
    """Write a commented YAML file, and empty files of rows with a note on their format.

    Args:
        found: what `survey` returned.
        config: the YAML file.

    Returns:
        The files that were written; those that are there already stay as they are.
    """
    texts = {config: _yaml(found)}
    for name in found.without_rows:
        for file, rows in zip(("probe.jsonl", "test.jsonl"), _rows_of(found, name)):
            if not rows:
                texts[found.tasks / name / file] = ""
    if found.without_rows:
        texts[found.tasks / NOTE] = _ROWS
    written = [path for path in texts if not path.exists()]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, texts[path])
    return written


def _rows_of(found: Survey, name: str) -> tuple[int, int]:
    return next(one.rows for one in found.found if one.name == name)


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], "..."] if len(names) > 5 else names)


def _yaml(found: Survey) -> str:
    base = found.base or ""
    embedded = base.rpartition("/")[2] == EMBEDDED
    why, model = "which no adapter names", "# model: DIR or owner/name"
    if embedded:
        why, model = "which is the embedded default", "# model: left out"
    elif base:
        # Also if it is a folder that has moved: the embedded default would be another model.
        why, model = "as the adapters name it", f"model: {_value(base)}"
    sizes = "\n".join(f"#   {text:<7} {size(nbytes)}" for text, nbytes in budgets(found))
    none = len(found.without_rows) == len(found.found)
    rows = "# Without this line weights alone decide, and nothing is measured.\n" if none else ""
    return f"""\
# Options of d2c-mlx run; d2c-mlx run --help has all. An option on the command line overrides it.
adapters: {_value(found.adapters)}
{rows}tasks: {_value(str(found.tasks))}
# The base model, {why}.
{model}
# The budget, of {size(found.nbytes)} in 16 bit. Bytes keep adapters at a lower rank and precision.
# A number merges them into as many, which stock mlx-lm loads.
{sizes}
budget: "12.5%"  # {size(int(0.125 * found.nbytes))}
output: runs/first
probe_examples: 10  # calibration rows per task
test_examples: 30  # most held-out rows per task; 100 judge better and take longer
"""


def _value(text: str) -> str:
    """A YAML scalar on one line."""
    return yaml.safe_dump(text, width=10**6, allow_unicode=True).split("\n")[0]
