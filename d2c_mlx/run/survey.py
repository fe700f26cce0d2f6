"""A look at a folder of adapters and their rows, and the files that a first run needs.

No base model is loaded, and nothing of the user's is replaced.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path

import mlx.core as mx
import yaml

from d2c_mlx.adapters.reading import find_adapters, read_adapter, weights_file
from d2c_mlx.models.resolve import EMBEDDED
from d2c_mlx.models.rows import read_rows
from d2c_mlx.models.tasks import probe_file
from d2c_mlx.utils.errors import AdapterError, ConfigError, InputError, collect
from d2c_mlx.utils.files import write_text
from d2c_mlx.utils.templates import size, span

_ROWS = """\
# Rows
A folder per adapter, called like it, with two files, one JSON object a line:

- `probe.jsonl`: about 10 calibration rows, which decide what is merged and how much is kept.
- `test.jsonl`: 30 to 100 held-out rows, which judge. No prompt may be in both.

Take rows like those that the adapter was trained on, but not those, in one of mlx-lm's formats:

    {"prompt": "What is asked", "completion": "the right answer"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

A row without a completion is a prompt: its adapter answers it before anything is measured. If the
adapter was trained with a system message other than the chat template's, begin `messages` with it.
"""


@dataclass(frozen=True)
class SeenAdapter:
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
    base: str | None
    rank: int | None
    modules: tuple[str, ...]
    nbytes: int
    rows: tuple[int, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """What a first look at a folder of adapters shows.

    Attributes:
        folder: the folder, as it was given.
        tasks: the folder of their rows, which may not exist.
        adapters: the adapters, sorted by name.
        nbytes: bytes of all adapters in 16 bit.
        budgets: budgets, as `--budget` takes them, and the bytes that each would be.
        without_rows: names of adapters that lack calibration or held-out rows.
    """

    folder: str
    tasks: Path
    adapters: Sequence[SeenAdapter]
    nbytes: int
    budgets: Mapping[str, int]
    without_rows: Sequence[str]


def survey(adapters: str, tasks: Path | None = None, new: Path = Path("tasks")) -> Survey:
    """Look at every adapter of a folder and at its rows; nothing is written.

    Args:
        adapters: the folder, or a list, as for `--adapters`.
        tasks: the folder of rows; None is the one beside the folder, or here for a list, that has
            rows of these adapters.
        new: the folder for rows where none are found.

    Raises:
        InputError: there are no adapters, or none that can be read; or several folders have rows,
            or new ones would lie among the adapters. What is wrong with some of the adapters is in
            their `problems`.
    """
    sources = find_adapters(adapters, "DIR")
    if tasks is None:
        folder = Path(os.path.abspath(adapters))
        root = folder.parent if all(source.folder for source in sources) else Path()
        globs = [f"*/{escape(source.name)}/*.jsonl" for source in sources]
        inside = {path.parent.parent for pattern in globs for path in root.glob(pattern)}
        if len(inside) > 1:
            both = " and ".join(sorted(map(os.path.relpath, inside)))
            raise ConfigError(f"tasks: found rows in {both}, expected one folder; give --tasks DIR")
        if not inside and new.resolve().parent == folder:
            raise ConfigError(
                f"{new}: new rows would lie among the adapters; give --tasks DIR, or call init from"
                " the folder around them"
            )
        tasks = Path(os.path.relpath(inside.pop())) if inside else new
    seen = []
    for source in sources:
        errors: list[InputError] = []
        file = collect(errors, partial(weights_file, source.path))
        # A GGUF cannot be read without the base's module names.
        readable = file is not None and file.suffix.lower() != ".gguf"
        adapter = collect(errors, partial(read_adapter, source.path)) if readable else None
        counts = []
        for path in (probe_file(tasks / source.name), tasks / source.name / "test.jsonl"):
            there = path.is_file() and path.stat().st_size > 0
            rows = collect(errors, partial(read_rows, path, "")) if there else None
            counts.append(len(rows or ()))
        modules, nbytes = set[str](), file.stat().st_size if file else 0
        if adapter:
            modules = {path.rpartition(".")[2] for path in adapter.modules}
            blocks = [int(i) for x in adapter.modules for i in re.findall(r"\.(\d+)\.", x)[:1]]
            nbytes = adapter.uniform(mx.float16).nbytes(max(blocks, default=0) + 1)
        base, rank = (adapter.base, adapter.rank) if adapter else (None, None)
        problems = tuple(line for error in errors for line in error.problems)
        names = tuple(sorted(modules))
        seen.append(SeenAdapter(source.name, base, rank, names, nbytes, tuple(counts), problems))
    if all(adapter.problems and not adapter.modules for adapter in seen):
        raise AdapterError(line for adapter in seen for line in adapter.problems)
    n, sizes = len(seen), [adapter.nbytes for adapter in seen]
    budgets = {f"{share:g}%": int(share * sum(sizes) / 100) for share in (50, 25, 12.5, 6.25, 3)}
    budgets |= {str(k): k * max(sizes) for k in (n // 2, n // 4, n // 8, 1) if 0 < k < n}
    without_rows = [adapter.name for adapter in seen if 0 in adapter.rows]
    return Survey(adapters, tasks, seen, sum(sizes), budgets, without_rows)


def describe(seen: Survey) -> str:
    """A survey for people: adapters, bases, budgets, and what is missing."""
    ranks = sorted({adapter.rank for adapter in seen.adapters if adapter.rank})
    modules = sorted({name for adapter in seen.adapters for name in adapter.modules})
    bases = sorted({adapter.base or "not named" for adapter in seen.adapters if adapter.modules})
    lines = [
        f"{len(seen.adapters)} adapters in {seen.folder}, {size(seen.nbytes)} in 16 bit",
        f"base model   {', '.join(bases) or 'unknown'}",
        f"ranks        {', '.join(map(str, ranks)) or 'unknown without the base model'}",
        f"modules      {', '.join(modules) or 'unknown without the base model'}",
        "",
        "budget       bytes",
        *(f"{text:<12} {size(nbytes)}" for text, nbytes in seen.budgets.items()),
        "",
        *(f"problem      {line}" for adapter in seen.adapters for line in adapter.problems),
    ]
    if rows := [adapter.rows for adapter in seen.adapters if 0 not in adapter.rows]:
        probe, test = zip(*rows)
        counts = f"{span(probe)} calibration and {span(test)} held-out rows"
        lines.append(f"rows         in {seen.tasks}: {counts} each")
    if missing := seen.without_rows:
        names = ", ".join([*missing[:5], "..."] if len(missing) > 5 else missing)
        share = f"{len(missing)} of {len(seen.adapters)}"
        lines.append(f"rows         missing for {names} ({share}) in {seen.tasks}")
    return "\n".join(lines)


def scaffold(seen: Survey, config: Path) -> list[Path]:
    """Write a commented YAML file, and empty files of rows with a note on their format.

    Returns:
        The files that were written; those that are there already stay as they are.
    """

    def value(text: str) -> str:
        return yaml.safe_dump(text, width=10**6, allow_unicode=True).split("\n")[0]

    bases = Counter(adapter.base for adapter in seen.adapters if adapter.base).most_common(1)
    # Also if it is a folder that has moved: the embedded default would be another model.
    model = f"model: {value(bases[0][0])}" if bases else "# model: DIR or owner/name"
    if bases and bases[0][0].rpartition("/")[2] == EMBEDDED:
        model = "# model: left out, the embedded default"
    options = f"""\
# Options of d2c-mlx run; d2c-mlx run --help has all. An option on the command line overrides it.
adapters: {value(seen.folder)}
# Without this line weights alone decide, and nothing is measured.
tasks: {value(str(seen.tasks))}
# The base model, as the adapters name it.
{model}
# The budget, of {size(seen.nbytes)} in 16 bit. Bytes keep adapters at a lower rank and precision.
# A number merges them into as many, which stock mlx-lm loads.
budget: "12.5%"  # {size(int(0.125 * seen.nbytes))}
output: runs/first
probe_examples: 10  # calibration rows per task
test_examples: 30  # most held-out rows per task; 100 judge better and take longer
"""
    texts = {config: options}
    for adapter in seen.adapters:
        for file, n_rows in zip(("probe.jsonl", "test.jsonl"), adapter.rows):
            if not n_rows:
                texts[seen.tasks / adapter.name / file] = ""
    if seen.without_rows:
        texts[seen.tasks / "README.md"] = _ROWS
    written = [path for path in texts if not path.exists()]
    for path in written:
        write_text(path, texts[path])
    return written
