"""May this directory be replaced as a whole? Only if it holds no input, and only our files.

Each output directory has a marker, `.d2c-mlx.json`, with the kind of the command that wrote it and
every file that it wrote; a command deletes nothing else. Its name is hidden, so listings of
adapters and hashes of directories skip it, and no program that reads adapters looks at it. A pack
has its manifest instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d2c_mlx.adapters.adapter import CONFIG
from d2c_mlx.utils.environment import VERSION
from d2c_mlx.utils.errors import ConfigError
from d2c_mlx.utils.files import hash_file, write_json
from d2c_mlx.utils.parsing import json_or_none

if TYPE_CHECKING:
    from d2c_mlx.adapters.reading import Source

MARKER = ".d2c-mlx.json"
_FORMAT = {"format": "d2c-mlx-output", "format_version": 1}
# Folders of a run directory that a run writes anew, each with a marker; `refining` has one in each
# of its folders. `Run.check_pack` looks after the pack.
_RUN_FOLDERS = ("adapters", "answered", "planned", "merged", "refined", "refining")
# Files of rows, any of which may be a link.
_ROWS = ("probe.jsonl", "valid.jsonl", "test.jsonl")
# The names that a run may replace in its directory; a test compares them with a run.
RUN_WRITES = (
    *_RUN_FOLDERS, "pack", ".stages", ".lock", MARKER, "config.yaml", "losses.json", "plan.json",
    "clusters.json", "merges.json", "refines.json", "bench.json", "weights.json",
    "report.html",
)  # fmt: skip


def mark(directory: Path, kind: str, files: Mapping[str, str | None] | None = None) -> None:
    """Mark a directory whose files are complete, last inside `write_dir`.

    Args:
        directory: the directory.
        kind: name of the command.
        files: path relative to the directory -> hex SHA-256 of its content, or None where the
            content changes as a run goes on; None is all files that are there.
    """
    if files is None:
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): hash_file(path) for path in paths}
    # The version is for people.
    content = {**_FORMAT, "version": VERSION, "kind": kind, "files": dict(files)}
    write_json(directory / MARKER, content)


def listed(directory: Path, kind: str) -> Mapping[str, str | None]:
    """The files that a marker lists, see `mark`; none where no command of this kind wrote it."""
    content = json_or_none(directory / MARKER)
    if not isinstance(content, dict) or not {**_FORMAT, "kind": kind}.items() <= content.items():
        return {}
    files = content.get("files")
    return files if isinstance(files, dict) else {}


def check_output(
    output: Path,
    kind: str,
    inputs: Sequence[tuple[str, Path]] = (),
    sources: Sequence[Source] = (),
    model: str | None = None,
) -> None:
    """Refuse an output directory that must not be replaced as a whole.

    Call it before anything is written there. A directory may be replaced if it is empty or holds
    only files that its marker lists, unchanged, and a command of the same kind wrote it.

    Args:
        output: the directory, which may not exist.
        kind: name of the command.
        inputs: options and their paths, which are read while it is written.
        sources: adapters that are read; the output must not be in a folder of them either.
        model: the base model that is read; one that is no path does not matter.

    Raises:
        ConfigError: an input is in it; it is a file, or what `check_replaced` refuses.
    """
    _check_inputs(output, [output], inputs, sources, model)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {output} is a file, expected a directory or a new name")
    check_replaced(output, _foreign(output, kind))


def check_replaced(directory: Path, foreign: Iterator[Path]) -> None:
    """Refuse to replace a directory that you are in, or that holds a file of another's.

    Args:
        directory: the directory, which may not exist.
        foreign: files in it that must not be lost.

    Raises:
        ConfigError: it must not be replaced.
    """
    if Path(os.path.realpath(directory)) in (here := Path.cwd().resolve(), *here.parents):
        raise ConfigError(
            f"{directory}: is replaced as a whole, and you are in it; give this command elsewhere"
        )
    if path := next(foreign, None):
        raise ConfigError(
            f"{directory}: is replaced as a whole, and {path} in it is of no earlier output of this"
            " kind; name another directory, or move it elsewhere"
        )


def check_run(
    output: Path, sources: Sequence[Source], tasks: str | None, model: str | None
) -> None:
    """Check that a run replaces only what an earlier run wrote; call it before anything is written.

    Args:
        output: directory of the run; files of the user's may lie beside those of `RUN_WRITES`.
        sources: its adapters.
        tasks: directory of its rows.
        model: its base model, as for `check_output`.

    Raises:
        ConfigError: the run would replace an input, or files that no earlier run wrote, or its
            directory would be taken for one of its adapters.
    """
    folder, targets = Path(tasks or ""), [output / name for name in RUN_WRITES]
    rows = [folder / source.name / file for source in sources for file in _ROWS]
    inputs = [("tasks", path) for path in (folder, *rows)] if tasks else []
    _check_inputs(output, targets, inputs, sources, model)
    written = listed(output, "run")
    foreign = [
        path for path in targets if path.name not in (".lock", *written) and any(all_files(path))
    ]
    foreign += [x for x in targets if x.suffix and x.is_dir() and x not in foreign]
    folders = [output / name for name in _RUN_FOLDERS if name in written]
    for folder in [*folders, *(output / "refining").glob("[!.]*")]:
        foreign += _foreign(folder, "run") if folder.name != "refining" else []
    if foreign:
        raise ConfigError(
            f"output: a run in {output} would replace your {', '.join(map(str, foreign[:9]))},"
            " which no earlier run wrote; give another --output, or move what is yours"
        )


def all_files(directory: Path) -> Iterator[Path]:
    """All files below a directory in order: what would be lost with it, unless we wrote them.

    Those that a Mac leaves by itself do not count. A link to a directory counts as a file: it would
    be lost, and nothing behind it. A path that is no directory counts itself.
    """
    if os.path.lexists(directory) and not directory.is_dir():
        yield directory
    for folder, folders, files in os.walk(directory):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(folder) / name
            # One in a folder, the other beside a file on a drive of another system.
            beside = name[:2] == "._" and path.with_name(name[2:]).exists()
            if name != ".DS_Store" and not beside:
                yield path


def _foreign(directory: Path, kind: str) -> Iterator[Path]:
    """Files below a directory that no command of this kind wrote, or not as they are now.

    A run repairs its own files, so of those only a readable config that was changed counts: it
    belongs to another adapter, which the user put in the place of the run's.
    """
    files = listed(directory, kind)
    for path in all_files(directory):
        name = path.relative_to(directory).as_posix()
        repaired = kind == "run" and (path.name != CONFIG or json_or_none(path) is None)
        same = repaired or (path.is_file() and files.get(name) == hash_file(path))
        if not (name == MARKER and files) and not (name in files and same):
            yield path


def _check_inputs(
    output: Path,
    targets: Sequence[Path],
    inputs: Sequence[tuple[str, Path]],
    sources: Sequence[Source],
    model: str | None,
) -> None:
    """Refuse paths to be replaced that hold an input, and an output in a folder of adapters."""
    folders = dict.fromkeys(source.folder for source in sources if source.folder)
    base = Path(os.path.expanduser(model or ""))
    inputs = [*inputs, *([("model", base)] if model else [])]
    # Folders come first: one of them says more than the adapters in it.
    inputs += [("adapters", path) for path in (*folders, *(source.path for source in sources))]
    places = {identity: path for path in targets if (identity := _identity(path))}
    inside: dict[tuple[str, Path], Path] = {}
    for option, path in inputs:
        for identity in _around(path) & places.keys() if path.exists() else ():
            inside.setdefault((option, places[identity]), path)
    problems = [
        f"output: this command writes {target} anew, which would replace the {option} {path}; give"
        " another --output"
        for (option, target), path in inside.items()
    ]
    problems += [
        f"output: {output} is in the adapters' folder {folder}, where the next command would take"
        " it for an adapter; give another --output"
        for folder in folders
        if _identity(folder) in _around(output)
    ]
    if problems:
        raise ConfigError(problems)


def _identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of one directory: links, and capitals on a Mac."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino


def _around(path: Path) -> set[tuple[int, int]]:
    """Identities of a path and of all directories around it; a link is in two places."""
    ways = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    around = {_identity(folder) for way in ways for folder in (way, *way.parents)}
    return {identity for identity in around if identity}
